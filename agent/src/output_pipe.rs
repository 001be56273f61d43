//! The pipe to which a process writes its output, as the agent reads it.

use std::{
    io,
    os::fd::OwnedFd,
    pin::Pin,
    task::{Context, Poll, ready},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::{pipe2, read},
};
use rustix::{
    io::retry_on_intr,
    pipe::{SpliceFlags, splice},
};
use tokio::io::{AsyncRead, ReadBuf, unix::AsyncFd};

use crate::process::set_nonblocking;

/// Bytes that wait in a pipe: more than the 64 KiB that it holds by itself (pipe(7)), so that a program that writes much and the agent do not
/// take turns for each of its writes.
pub(crate) const CAPACITY: usize = 256 * 1024;

/// The reading end. As long as much comes, what is there is first moved to a pipe of the agent's own, which copies nothing: neither waits
/// while the other's bytes are copied, for a pipe can be used by one at a time.
pub(crate) struct OutputPipe {
    programs: AsyncFd<OwnedFd>,
    own: Option<Own>,
}

/// A pipe in which nobody writes meanwhile.
struct Own {
    reader: OwnedFd,
    writer: OwnedFd,
    /// Nothing is in it.
    empty: bool,
}

impl OutputPipe {
    /// Of a pipe's reading end, and what the process is to have.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn new() -> io::Result<(Self, OwnedFd)> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        grow(&reader);
        set_nonblocking(&reader)?;
        // SAFETY: the descriptor is this structure's alone, and open as long as it is.
        let programs = unsafe { AsyncFd::register(reader) }?;
        Ok((Self { programs, own: None }, writer))
    }

    /// Reads what was moved before. None when there is nothing.
    fn read_own(&mut self, buffer: &mut ReadBuf<'_>) -> Option<io::Result<()>> {
        let own = self.own.as_mut().filter(|own| !own.empty)?;
        loop {
            match read(&own.reader, buffer.initialize_unfilled()) {
                Ok(count) => {
                    buffer.advance(count);
                    return Some(Ok(()));
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    own.empty = true;
                    return None;
                }
                Err(error) => return Some(Err(error.into())),
            }
        }
    }
}

impl AsyncRead for OutputPipe {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if let Some(read) = this.read_own(buffer) {
                return Poll::Ready(read);
            }
            let mut ready = ready!(this.programs.poll_read_ready(cx))?;
            match &mut this.own {
                Some(own) => match ready.try_io(|programs| own.take(programs.get_ref())) {
                    Ok(Ok(0)) => return Poll::Ready(Ok(())),
                    Ok(Ok(_)) | Err(_) => {}
                    Ok(Err(error)) => return Poll::Ready(Err(error)),
                },
                None => {
                    let free = buffer.initialize_unfilled();
                    let most = free.len();
                    if let Ok(count) = ready.try_io(|programs| Ok(read(programs, free)?)) {
                        let count = count?;
                        buffer.advance(count);
                        if count == most {
                            // If there are no descriptors, it goes on as before.
                            this.own = Own::new().ok();
                        }
                        return Poll::Ready(Ok(()));
                    }
                }
            }
        }
    }
}

impl Own {
    fn new() -> io::Result<Self> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        grow(&reader);
        Ok(Self {
            reader,
            writer,
            empty: true,
        })
    }

    /// Moves what is in the program's pipe to this one, which is empty. Answers how many bytes, 0 at the end.
    fn take(&mut self, programs: &OwnedFd) -> io::Result<usize> {
        // Also when it fails: of a write that has failed Linux leaves an empty piece in a pipe, up to 6.13, and only reading takes that away.
        self.empty = false;
        let moved = retry_on_intr(|| splice(programs, None, &self.writer, None, CAPACITY, SpliceFlags::NONBLOCK))?;
        self.empty = moved == 0;
        Ok(moved)
    }
}

/// A smaller one does as well.
fn grow(pipe: &OwnedFd) {
    if let Ok(capacity) = libc::c_int::try_from(CAPACITY) {
        let _ = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(capacity));
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn what_is_written_is_read_whatever_way_it_goes() {
        let (mut output, program) = OutputPipe::new().unwrap();
        let sent: Vec<u8> = (0..=255).cycle().take(3_000_000).collect();
        let expected = sent.clone();
        let program = std::thread::spawn(move || {
            let mut program = std::fs::File::from(program);
            std::io::Write::write_all(&mut program, &sent[..10]).unwrap();
            for piece in sent[10..].chunks(70_001) {
                std::io::Write::write_all(&mut program, piece).unwrap();
            }
        });
        let (mut all, mut buffer) = (Vec::new(), vec![0; 4096]);
        loop {
            let count = output.read(&mut buffer).await.unwrap();
            if count == 0 {
                break;
            }
            all.extend_from_slice(&buffer[..count]);
        }
        program.join().unwrap();
        assert!(all == expected);
        assert!(output.own.is_some());
    }

    #[tokio::test]
    async fn packets_are_read_to_their_end() {
        let (mut output, program) = OutputPipe::new().unwrap();
        fcntl(&program, FcntlArg::F_SETFL(OFlag::O_DIRECT)).unwrap();
        output.own = Some(Own::new().unwrap());
        let mut buffer = [0; 4096];
        for size in [4096, 1, 100] {
            nix::unistd::write(&program, &vec![7; size]).unwrap();
        }
        for size in [4096, 1, 100] {
            assert_eq!(output.read(&mut buffer).await.unwrap(), size);
        }
        drop(program);
        assert_eq!(output.read(&mut buffer).await.unwrap(), 0);
    }
}
