//! What README.md shows is what it says: every example is read without a warning, and Debian's Ignition takes the outcome.

use std::fs;
use std::path::Path;

use coreos_kvm_ignition::{Kind, Options, Platform, Version, transpile};

use crate::debian;

/// Language and text of every fenced block of a section.
fn blocks(section: &str) -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let readme = fs::read_to_string(path).expect("README.md is there");
    let heading = format!("## {section}\n");
    let (_, rest) = readme
        .split_once(&heading)
        .unwrap_or_else(|| panic!("README.md has no section {section}"));
    let section = rest.split("\n## ").next().unwrap_or_default();
    // Every second part is between fences.
    let fenced = section.split("```").skip(1).step_by(2);
    fenced
        .filter_map(|block| block.split_once('\n'))
        .map(|(language, text)| (language.to_owned(), text.to_owned()))
        .collect()
}

/// The language that the library takes the example for.
fn hold(text: &str) -> Kind {
    let options = Options {
        platform: Some(Platform::Custom),
        ..Options::default()
    };
    let done = transpile(text, &options).unwrap_or_else(|report| panic!("{report}\n{text}"));
    assert!(!done.report.has_warnings(), "{}\n{text}", done.report);
    let known: Vec<Version> = debian::KNOWN
        .iter()
        .map(|version| version.parse().expect("a version of Ignition"))
        .collect();
    let config = done
        .config
        .for_guest(&known)
        .unwrap_or_else(|report| panic!("{report}\n{text}"));
    assert_eq!(debian::validate(&config.to_json()), Ok(String::new()), "{text}");
    done.kind
}

#[test]
fn every_language_of_the_readme_is_what_it_says() {
    let kinds: Vec<Kind> = blocks("Say what the system is")
        .iter()
        .map(|(language, text)| {
            assert!(["yaml", "json"].contains(&language.as_str()), "{text}");
            hold(text)
        })
        .collect();
    assert_eq!(
        kinds,
        [
            Kind::Butane,
            Kind::ContainerLinuxConfig,
            Kind::CloudConfig,
            Kind::Ignition
        ]
    );
}

#[test]
fn the_pod_of_the_readme_has_a_configuration() {
    let blocks = blocks("Write a pod");
    let (_, manifests) = blocks.first().expect("a pod is shown");
    // The value of a key is what is indented below it.
    let below = manifests
        .split_once("  config.yaml: |\n")
        .expect("its ConfigMap has config.yaml")
        .1;
    let lines = below.lines().map_while(|line| line.strip_prefix("    "));
    let text: String = lines.flat_map(|line| [line, "\n"]).collect();
    assert!(text.contains("systemd:"), "{text}");
    assert_eq!(hold(&text), Kind::Butane);
}
