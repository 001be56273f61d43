//! What the guest prints on its serial console: kept on disk within bounds, however much it prints, and the last lines at
//! hand for error messages.
//!
//! Kept are the first 64 KiB (`console.first`, the boot) and the last 1 to 2 MiB (`console.log`, and before it
//! `console.log.1`). The guest may print 1 MiB a second; beyond that its writes wait, and so does the guest alone.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

/// Bytes of the beginning that are kept for good.
const FIRST: u64 = 64 * 1024;
/// Bytes of a log file before the next is begun.
const FILE: u64 = 1024 * 1024;
/// Bytes that the guest may print in one second.
const PER_SECOND: usize = 1024 * 1024;
/// Bytes at hand for error messages.
const TAIL: usize = 8 * 1024;
/// Longest line in an error message, in characters: what Ignition says of a failure is some 190, and may come after the firmware's last words,
/// which have no end of line.
const LINE: usize = 300;

/// Takes what the guest prints as it comes, in pieces. What finds no room is left out there, and kept on disk all the same.
pub type Watcher = mpsc::Sender<Vec<u8>>;

/// The console of one machine. Dropping it ends the reading.
#[derive(Debug)]
pub struct Console {
    tail: Tail,
    reader: JoinHandle<()>,
}

impl Console {
    /// Reads `source`, the host's end of the guest's serial port, to its end, and keeps what it says in `log` and beside it.
    ///
    /// # Errors
    /// When the files cannot be made.
    pub fn start(
        source: impl AsyncRead + Unpin + Send + 'static,
        log: &Path,
        watcher: Option<Watcher>,
    ) -> io::Result<Self> {
        let tail = Tail::new(TAIL);
        let mut writer = Log::create(log)?;
        let seen = tail.clone();
        let reader = tokio::spawn(async move {
            if let Err(error) = copy(source, &mut writer, &seen, watcher).await {
                tracing::warn!(%error, log = %writer.path.display(), "the guest's console is no longer read");
            }
        });
        Ok(Self { tail, reader })
    }

    /// The last `count` lines, made harmless.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        self.tail.last_lines(count)
    }

    /// Waits until the guest can print no more and all it printed is on disk; QEMU's end brings that about.
    pub async fn finished(&mut self, at_most: Duration) {
        // What is late after that is lost with the machine.
        let _ = tokio::time::timeout(at_most, &mut self.reader).await;
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

async fn copy(
    mut source: impl AsyncRead + Unpin,
    log: &mut Log,
    tail: &Tail,
    watcher: Option<Watcher>,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    let (mut second, mut printed) = (Instant::now(), 0);
    loop {
        let count = source.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        tail.push(&buffer[..count]);
        if let Some(watcher) = &watcher {
            // A watcher that is slow, or has gone, must not hold up the guest.
            let _ = watcher.try_send(buffer[..count].to_vec());
        }
        log.keep(&buffer[..count]);

        if second.elapsed() >= Duration::from_secs(1) {
            (second, printed) = (Instant::now(), 0);
        }
        printed += count;
        if printed >= PER_SECOND {
            sleep_until(second + Duration::from_secs(1)).await;
        }
    }
}

/// The files. Writing goes to a file system in memory or to the page cache, and is not worth a thread.
struct Log {
    path: PathBuf,
    current: File,
    written: u64,
    first: File,
    first_written: u64,
    /// Something could not be written, as on a full disk.
    incomplete: bool,
}

impl Log {
    fn create(path: &Path) -> io::Result<Self> {
        Ok(Self {
            current: create(path)?,
            written: 0,
            first: create(&path.with_extension("first"))?,
            first_written: 0,
            incomplete: false,
            path: path.to_owned(),
        })
    }

    /// Writes what can be written. For the rest the guest does not have to wait, nor the last lines: only the files lack it.
    fn keep(&mut self, bytes: &[u8]) {
        if let Err(error) = self.write(bytes)
            && !std::mem::replace(&mut self.incomplete, true)
        {
            tracing::warn!(%error, log = %self.path.display(), "what the guest prints is not recorded in full");
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let room = usize::try_from(FIRST.saturating_sub(self.first_written)).unwrap_or(0);
        let first = &bytes[..bytes.len().min(room)];
        write_all(&mut self.first, first, &mut self.first_written)?;

        if self.written + bytes.len() as u64 > FILE {
            match std::fs::rename(&self.path, self.path.with_extension("log.1")) {
                // There was no room for the new one when it was renamed before.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                renamed => renamed?,
            }
            self.current = create(&self.path)?;
            self.written = 0;
        }
        write_all(&mut self.current, bytes, &mut self.written)
    }
}

/// Counts also what was written before there was no room any more.
fn write_all(file: &mut File, mut bytes: &[u8], written: &mut u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = file.write(bytes)?;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        *written += count as u64;
        bytes = &bytes[count..];
    }
    Ok(())
}

fn create(path: &Path) -> io::Result<File> {
    File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

/// The last bytes of something that is written, for error messages.
#[derive(Debug, Clone)]
pub(crate) struct Tail {
    bytes: Arc<Mutex<VecDeque<u8>>>,
    limit: usize,
}

impl Tail {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            bytes: Arc::default(),
            limit,
        }
    }

    fn bytes(&self) -> MutexGuard<'_, VecDeque<u8>> {
        // Bytes are bytes, whoever was interrupted among them.
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, new: &[u8]) {
        let mut bytes = self.bytes();
        bytes.extend(new);
        let surplus = bytes.len().saturating_sub(self.limit);
        bytes.drain(..surplus);
    }

    /// The last `count` lines that are not empty. Whatever could move a cursor or change a terminal is taken out, for the
    /// guest chose these bytes and a person's terminal may show them.
    pub(crate) fn last_lines(&self, count: usize) -> Vec<String> {
        let bytes: Vec<u8> = self.bytes().iter().copied().collect();
        let text = harmless(&String::from_utf8_lossy(&bytes));
        let mut lines: Vec<String> = text
            .lines()
            .rev()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .take(count)
            .map(|line| line.chars().take(LINE).collect())
            .collect();
        lines.reverse();
        lines
    }
}

/// Text without escape sequences (ECMA-48) and control characters; lines end as lines.
pub fn harmless(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\u{1b}' => match characters.next() {
                // A control sequence ends with its first byte from '@' on.
                Some('[') => {
                    while characters.next_if(|c| !('@'..='~').contains(c)).is_some() {}
                    characters.next();
                }
                // A string (title, and the like) ends with BEL or ESC \.
                Some(']' | 'P' | 'X' | '^' | '_') => {
                    while characters
                        .next_if(|c| !matches!(c, '\u{7}' | '\u{1b}' | '\n'))
                        .is_some()
                    {}
                    characters.next_if_eq(&'\u{7}');
                }
                _ => {}
            },
            '\r' | '\n' if clean.ends_with('\n') => {}
            '\r' | '\n' => clean.push('\n'),
            '\t' => clean.push(' '),
            // Direction overrides make a line read otherwise than it is.
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {}
            character if character.is_control() => {}
            character => clean.push(character),
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("plain", "plain")]
    #[case("\u{1b}[1;31mred\u{1b}[0m", "red")]
    #[case("\u{1b}]0;title\u{7}text", "text")]
    #[case("\u{1b}]0;title\u{1b}\\text", "text")]
    #[case("a\r\nb\rc", "a\nb\nc")]
    #[case("a\u{8}\u{0}b\u{9b}c", "abc")]
    #[case("\u{202e}abc", "abc")]
    #[case("\u{1b}", "")]
    #[case("\u{1b}[", "")]
    fn terminal_commands_are_taken_out(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(harmless(text), expected);
    }

    #[test]
    fn the_tail_is_bounded_and_in_lines() {
        let tail = Tail::new(16);
        tail.push(b"lost lost lost\n");
        tail.push(b"one\n\ntwo\r\nthree");
        assert_eq!(tail.last_lines(2), ["two", "three"]);
        tail.push(&[b'x'; 1000]);
        assert_eq!(tail.last_lines(9), ["x".repeat(16)]);
    }

    #[tokio::test]
    async fn a_watcher_sees_what_is_printed_and_its_absence_hurts_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let (watcher, mut seen) = mpsc::channel(4);
        let log = folder.path().join("console.log");
        let mut console = Console::start(io::Cursor::new(b"hello".to_vec()), &log, Some(watcher)).unwrap();
        assert_eq!(seen.recv().await.as_deref(), Some(b"hello".as_slice()));
        assert_eq!(seen.recv().await, None);
        console.finished(Duration::from_secs(5)).await;

        let (watcher, seen) = mpsc::channel(1);
        drop(seen);
        let mut console = Console::start(io::Cursor::new(b"hello".to_vec()), &log, Some(watcher)).unwrap();
        console.finished(Duration::from_secs(5)).await;
        assert_eq!(console.last_lines(1), ["hello"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_prints_for_ever_fills_two_files_and_the_first_bytes_stay() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("console.log");
        let mut text = b"the very first line\n".to_vec();
        text.resize(5 * 1024 * 1024, b'x');
        text.extend(b"\nthe last line\n");
        let mut console = Console::start(io::Cursor::new(text), &log, None).unwrap();
        console.finished(Duration::from_secs(60)).await;

        let size = |name: &str| std::fs::metadata(folder.path().join(name)).unwrap().len();
        assert!(size("console.log") <= FILE && size("console.log.1") <= FILE);
        assert_eq!(size("console.first"), FIRST);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
        assert!(
            std::fs::read(folder.path().join("console.first"))
                .unwrap()
                .starts_with(b"the very first line\n")
        );
        assert!(std::fs::read(&log).unwrap().ends_with(b"the last line\n"));
        assert_eq!(console.last_lines(1), ["the last line"]);
    }
}
