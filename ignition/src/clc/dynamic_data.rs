//! Dynamic data: `{PRIVATE_IPV4}` and its kin in options of etcd and flannel become variables that `coreos-metadata` writes
//! when the machine boots.

use super::platform::Platform;

/// Whether there is dynamic data in a text. Any brace counts: no option has another use for one.
pub(super) fn is_in(text: &str) -> bool {
    text.contains(['{', '}'])
}

/// The text with variables of the platform in the place of dynamic data.
///
/// # Errors
/// A sentence that says what the platform does not have, or that there is no platform.
pub(super) fn resolve(text: &str, platform: Option<Platform>) -> Result<String, String> {
    let Some(platform) = platform else {
        return Err(format!(
            "dynamic data in braces depends on the platform, which has to be named: {}",
            Platform::names()
        ));
    };
    let mut resolved = String::with_capacity(text.len());
    let mut rest = text;
    // A brace that closes nothing ends the search, as it does in ct.
    while let Some((before, (name, after))) = rest
        .split_once('{')
        .filter(|(before, _)| !(resolved.is_empty() && before.contains('}')))
        .and_then(|(before, tail)| Some((before, tail.split_once('}')?)))
    {
        let variables = platform.variables();
        let Some((_, variable)) = variables.iter().find(|(known, _)| *known == name) else {
            let known: Vec<_> = variables.iter().map(|(known, _)| format!("{{{known}}}")).collect();
            // Other braces may be a part of anything, which is not for a report.
            let said = match Platform::Custom.variables().iter().find(|(known, _)| *known == name) {
                Some((known, _)) => format!("{{{known}}}"),
                None => "what is in braces".to_owned(),
            };
            return Err(format!(
                "{said} is nothing that {platform} tells of a machine: {} are",
                known.join(", ")
            ));
        };
        resolved.push_str(before);
        resolved.push_str("${");
        resolved.push_str(variable);
        resolved.push('}');
        rest = after;
    }
    resolved.push_str(rest);
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("http://{PRIVATE_IPV4}:2379", "http://${COREOS_EC2_IPV4_LOCAL}:2379")]
    #[case("{HOSTNAME}={PUBLIC_IPV4}", "${COREOS_EC2_HOSTNAME}=${COREOS_EC2_IPV4_PUBLIC}")]
    #[case("}{HOSTNAME}", "}{HOSTNAME}")]
    #[case("{HOSTNAME}}{HOSTNAME}", "${COREOS_EC2_HOSTNAME}}${COREOS_EC2_HOSTNAME}")]
    #[case("{HOSTNAME", "{HOSTNAME")]
    fn known_data_becomes_a_variable(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(resolve(text, Some(Platform::Ec2)).as_deref(), Ok(expected));
    }

    #[test]
    fn what_is_not_known_is_an_error() {
        let said = resolve("{PUBLIC_IPV6}", Some(Platform::Ec2)).unwrap_err();
        assert!(said.contains("{HOSTNAME}, {PRIVATE_IPV4}, {PUBLIC_IPV4}"), "{said}");
        let said = resolve("{HOSTNAME}", None).unwrap_err();
        assert!(said.contains("vagrant-virtualbox"), "{said}");
    }
}
