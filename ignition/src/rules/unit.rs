//! systemd's unit files, read as Ignition reads them: it refuses what it cannot read, and warns of an enabled unit that does
//! not say what enabling it means.

/// What of a unit file matters.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(crate) struct Unit {
    /// Whether any section sets anything.
    pub(crate) has_settings: bool,
    /// Whether `[Install]` sets anything.
    pub(crate) has_install: bool,
}

/// # Errors
/// A sentence that says why systemd could not read it.
pub(crate) fn parse(text: &str) -> Result<Unit, String> {
    let mut reader = Reader {
        text: text.as_bytes(),
        position: 0,
        read: 0,
    };
    let mut unit = Unit {
        has_settings: false,
        has_install: false,
    };
    let mut section: Option<&str> = None;
    loop {
        reader.check_line()?;
        let begin = reader.position;
        let Some(byte) = reader.byte() else { return Ok(unit) };
        match byte {
            b'[' => {
                reader.check_line()?;
                let name = reader
                    .until(b']')
                    .ok_or("no `]` follows the `[` that begins a section's name")?;
                reader.check_line()?;
                if !is_blank(reader.line()) {
                    return Err("something follows the `]` after a section's name".to_owned());
                }
                section = Some(if name == b"Install" { "Install" } else { "" });
            }
            b'#' | b';' => {
                reader.check_line()?;
                while without(reader.line(), b" ").ends_with(b"\\") {}
            }
            byte if section.is_none() || byte.is_ascii_whitespace() || byte == 0x0b => {}
            _ => {
                reader.position = begin;
                reader.check_line()?;
                reader.option_name()?;
                loop {
                    reader.check_line()?;
                    let line = reader.line();
                    if is_blank(line) || !line.ends_with(b"\\") {
                        break;
                    }
                }
                unit.has_settings = true;
                unit.has_install |= section == Some("Install");
            }
        }
    }
}

/// Whether a unit of this name is one of systemd's.
///
/// # Errors
/// A sentence that says what it should be called.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    const SUFFIXES: [&str; 12] = [
        ".service",
        ".socket",
        ".device",
        ".mount",
        ".automount",
        ".swap",
        ".target",
        ".path",
        ".timer",
        ".snapshot",
        ".slice",
        ".scope",
    ];
    if SUFFIXES.contains(&suffix(name)) {
        Ok(())
    } else {
        Err("is no unit's name, which ends in .service, .socket, .mount, .timer or another of systemd's".to_owned())
    }
}

/// # Errors
/// When the name does not end in `.conf`.
pub(crate) fn check_dropin_name(name: &str) -> Result<(), String> {
    if suffix(name) == ".conf" {
        Ok(())
    } else {
        Err("is no drop-in's name, which ends in .conf".to_owned())
    }
}

/// # Errors
/// When networkd knows no such file.
pub(crate) fn check_networkd_name(name: &str) -> Result<(), String> {
    if [".link", ".netdev", ".network"].contains(&suffix(name)) {
        Ok(())
    } else {
        Err("is no name of networkd's, which ends in .link, .netdev or .network".to_owned())
    }
}

/// From the last dot on, the dot included; empty where there is none in the last part of the path.
fn suffix(name: &str) -> &str {
    let last = name.rsplit('/').next().unwrap_or_default();
    last.rfind('.').map_or("", |dot| &last[dot..])
}

/// The library with which Ignition reads refuses a long line, but only where it happens to have all of it in its buffer. A
/// configuration is to be refused here exactly if it is there, so the buffer is kept account of.
struct Reader<'a> {
    text: &'a [u8],
    position: usize,
    /// How far the buffer reaches.
    read: usize,
}

const LINE_MAX: usize = 2048;
const BUFFER: usize = 4096;

impl<'a> Reader<'a> {
    fn fill(&mut self) {
        self.read = (self.position + BUFFER).min(self.text.len());
    }

    fn check_line(&self) -> Result<(), String> {
        let ahead = self.text.get(self.position..self.read).unwrap_or_default();
        match ahead.get(..LINE_MAX) {
            Some(line) if !line.iter().any(|byte| b"\r\n".contains(byte)) => Err(format!(
                "a line is longer than {LINE_MAX} bytes, which systemd does not read"
            )),
            _ => Ok(()),
        }
    }

    /// Whole characters are read; what follows only looks at those of one byte.
    fn byte(&mut self) -> Option<u8> {
        let lead = *self.text.get(self.position)?;
        let length = match lead {
            0xf0.. => 4,
            0xe0.. => 3,
            0xc0.. => 2,
            _ => 1,
        };
        if self.position + length > self.read {
            self.fill();
        }
        self.position += length;
        Some(lead)
    }

    /// Through the next such byte, without it.
    fn until(&mut self, end: u8) -> Option<&'a [u8]> {
        let begin = self.position;
        loop {
            let ahead = self.text.get(self.position..self.read).unwrap_or_default();
            if let Some(length) = ahead.iter().position(|byte| *byte == end) {
                self.position += length + 1;
                return self.text.get(begin..self.position - 1);
            }
            if self.read == self.text.len() {
                self.position = self.read;
                return None;
            }
            if self.read - self.position >= BUFFER {
                self.position = self.read;
            }
            self.fill();
        }
    }

    /// Through the end of the line, or of the text.
    fn line(&mut self) -> &'a [u8] {
        let begin = self.position;
        match self.until(b'\n') {
            Some(line) => line,
            None => without(self.text.get(begin..).unwrap_or_default(), b"\r"),
        }
    }

    fn option_name(&mut self) -> Result<(), String> {
        loop {
            match self.byte() {
                Some(b'=') => return Ok(()),
                Some(b'\n' | b'\r') | None => return Err("a line has no `=`: `Name=value` is expected".to_owned()),
                Some(_) => {}
            }
        }
    }
}

fn is_blank(line: &[u8]) -> bool {
    String::from_utf8_lossy(line).trim().is_empty()
}

fn without<'a>(line: &'a [u8], suffix: &[u8]) -> &'a [u8] {
    line.strip_suffix(suffix).unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("", Some((false, false)))]
    #[case("[Service]\nExecStart=/bin/true\n", Some((true, false)))]
    #[case("[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target", Some((true, true)))]
    #[case("[Install]\n", Some((false, false)))]
    #[case("# all\\\n[Install]\nA=b\n", Some((false, false)))]
    #[case("words before it\n[Install]\nA=b\n", Some((true, true)))]
    #[case("[Service]\nExecStart=/bin/true \\\n  [Install]\n", Some((true, false)))]
    #[case("[Unit\nA=b\n", None)]
    #[case("[Unit] A=b\n", None)]
    #[case("[Unit]\nno equals sign\n", None)]
    #[case("[Unit]\nA", None)]
    #[case("[Unit]\r\nA=b\r\n", Some((true, false)))]
    fn units_are_read(#[case] text: &str, #[case] expected: Option<(bool, bool)>) {
        let found = parse(text).ok().map(|unit| (unit.has_settings, unit.has_install));
        assert_eq!(found, expected);
    }

    #[test]
    fn a_long_line_is_refused() {
        assert!(parse(&format!("[Service]\nExecStart={}\n", "a".repeat(3000))).is_err());
        assert!(parse(&format!("[Service]\nExecStart={}\n", "a".repeat(1900))).is_ok());
    }

    #[rstest]
    #[case("a.service", true)]
    #[case("a@b.timer", true)]
    #[case(".mount", true)]
    #[case("a.conf", false)]
    #[case("a", false)]
    #[case("a.service/b", false)]
    fn names(#[case] name: &str, #[case] valid: bool) {
        assert_eq!(check_name(name).is_ok(), valid);
    }
}
