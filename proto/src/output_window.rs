//! How a process's output comes when there is much of it: not on its own connection, but in memory that guest and host share, the window,
//! where bytes cost both less. One stream has the window at a time.
//!
//! The host says in a stream's hello that it takes output there. Then:
//!
//! 1. The agent says on the connection that the stream turns away ([`Step::Turn`]).
//! 2. The host says [`Word::Go`] on the connection. What follows is in the window.
//! 3. The agent says in the window that the stream turns back, and the host [`Word::Done`] on the connection. What follows are frames there, and
//!    the window is free.
//!
//! A host that wants no more output says [`Word::Stop`] at any time after the first turn, and reads on until the stream has turned back, so that
//! nothing of it is left in the window for the next one. If the connection ends before the first word, nothing has come in the window.
//!
//! The window is the memory of an ivshmem device (docs/specs/ivshmem-spec.txt of QEMU) of [`SIZE`] bytes. In its first page is a [`Control`],
//! the others but the last are a ring of bytes. Who waits for the other says so there, looks once more, and is then woken by a byte of any value on the serial
//! port [`OUTPUT_SERIAL_PORT`](crate::OUTPUT_SERIAL_PORT).

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

use memmap2::{MmapOptions, MmapRaw};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::frame::Step;

/// Bytes of the window's memory.
pub const SIZE: usize = 1 << 20;
/// Bytes before the ring: a page.
const CONTROL: usize = 4096;
/// Bytes of the ring.
const RING: usize = SIZE - CONTROL - SPILL;
/// Bytes behind the ring, in which what is read into its end may end: what a pipe gives at once or not at all, if a program wants it so (O_DIRECT in
/// pipe(2)).
const SPILL: usize = 4096;
/// Bytes that are read at once at most: what a pipe holds by default (pipe(7)).
const CHUNK: usize = 64 * 1024;

/// What the host says on the connection of a stream of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Word {
    /// The window is read.
    Go = 1,
    /// Whatever follows is for nobody.
    Stop = 2,
    /// All that came in the window has been read.
    Done = 3,
}

impl Word {
    /// # Errors
    /// Of the connection.
    pub async fn say(self, connection: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        connection.write_u8(self as u8).await?;
        connection.flush().await
    }

    /// Waits for a word. Nothing is lost when it is not waited for to the end.
    ///
    /// # Errors
    /// Of the connection, also when it has ended; `InvalidData` for what is no word.
    pub async fn hear(connection: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let mut word = [0];
        match connection.read(&mut word).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => [Self::Go, Self::Stop, Self::Done]
                .into_iter()
                .find(|known| *known as u8 == word[0])
                .ok_or(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// What the two say to each other in the window, all zero at first, each number with the processor's byte order.
#[derive(Debug)]
#[repr(C)]
struct Control {
    /// Bytes that the guest has written to the ring, ever.
    written: AtomicU64,
    /// Of these the host has read so many.
    read: AtomicU64,
    /// 1 when the host waits for bytes, or for a turn.
    reader_waits: AtomicU32,
    /// 1 when the guest waits for room.
    writer_waits: AtomicU32,
    /// 1 when the stream turns back after what has been written.
    turned: AtomicU32,
}

/// The guest's side.
#[derive(Debug)]
pub struct Writer {
    map: MmapRaw,
    written: u64,
}

impl Writer {
    /// `memory` is the window's; who wrote to it before does no more.
    ///
    /// # Errors
    /// When it cannot be mapped.
    pub fn open(memory: &File) -> io::Result<Self> {
        let map = MmapOptions::new().len(SIZE).map_raw(memory)?;
        let written = control(&map).written.load(Ordering::Relaxed);
        Ok(Self { map, written })
    }

    fn free(&self) -> usize {
        let read = control(&self.map).read.load(Ordering::Acquire);
        let unread = usize::try_from(self.written.wrapping_sub(read)).unwrap_or(RING);
        RING.saturating_sub(unread)
    }

    /// Where the next bytes can be written: at least 4 KiB, unless there is no room.
    pub fn room(&mut self) -> &mut [u8] {
        let (start, free) = (place(self.written), self.free());
        let length = if has_room(free) {
            free.min(RING - start + SPILL)
        } else {
            0
        };
        // SAFETY: it is within the mapping, which lives as long as this borrow. Nobody else writes there, and the host does not read there
        // before it is told to.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(CONTROL + start), length) }
    }

    /// So many bytes of the room are written. Answers whether the host is to be woken.
    #[must_use]
    pub fn wrote(&mut self, count: usize) -> bool {
        let spilt = (place(self.written) + count).saturating_sub(RING).min(SPILL);
        // SAFETY: both are within the mapping and do not overlap; of the ring's beginning so much is free.
        unsafe {
            let ring = self.map.as_mut_ptr().add(CONTROL);
            ring.copy_from_nonoverlapping(ring.add(RING), spilt);
        }
        self.written = self.written.wrapping_add(count as u64);
        let control = control(&self.map);
        publish();
        control.written.store(self.written, Ordering::Release);
        is_waited_for(&control.reader_waits)
    }

    /// The stream turns back. Answers whether the host is to be woken.
    #[must_use]
    pub fn turn(&self) -> bool {
        let control = control(&self.map);
        publish();
        control.turned.store(1, Ordering::Release);
        is_waited_for(&control.reader_waits)
    }

    /// Says that there is no room and that it is waited for, unless there is some by now; answers whether to wait.
    #[must_use]
    pub fn waits(&self) -> bool {
        wait(&control(&self.map).writer_waits, || !has_room(self.free()))
    }
}

/// The host's side. Whatever the guest does to the memory, what is read is what was in it, and of the size that this says.
#[derive(Debug)]
pub struct Reader {
    memory: File,
    /// The first page.
    map: MmapRaw,
    read: u64,
    buffer: Vec<u8>,
    count: usize,
}

impl Reader {
    /// `memory` is the window's, all zero, and remains as long as it is.
    ///
    /// # Errors
    /// When it cannot be mapped.
    pub fn open(memory: File) -> io::Result<Self> {
        let map = MmapOptions::new().len(CONTROL).map_raw(&memory)?;
        Ok(Self {
            memory,
            map,
            read: 0,
            buffer: Vec::new(),
            count: 0,
        })
    }

    /// What is there: [`bytes`](Self::bytes), or that the stream turns back. None if there is nothing yet.
    ///
    /// # Errors
    /// `InvalidData` when more is there than the ring holds.
    pub fn step(&mut self) -> io::Result<Option<Step>> {
        let control = control(&self.map);
        // What was written before the turn is there as soon as the turn is.
        let turned = control.turned.load(Ordering::Acquire) != 0;
        let unread = control.written.load(Ordering::Acquire).wrapping_sub(self.read);
        let unread = usize::try_from(unread).unwrap_or(usize::MAX);
        if unread > RING {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if unread == 0 {
            if turned {
                control.turned.store(0, Ordering::Relaxed);
            }
            return Ok(turned.then_some(Step::Turn));
        }
        let start = place(self.read);
        self.count = unread.min(RING - start).min(CHUNK);
        self.buffer.resize(CHUNK, 0);
        let position = (CONTROL + start) as u64;
        self.memory.read_exact_at(&mut self.buffer[..self.count], position)?;
        self.read = self.read.wrapping_add(self.count as u64);
        control.read.store(self.read, Ordering::Release);
        Ok(Some(Step::Bytes))
    }

    /// What the last step has read, at most 64 KiB.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[..self.count]
    }

    /// Whether the guest is to be woken: it waits for room, and half of the ring is free.
    #[must_use]
    pub fn frees(&self) -> bool {
        let control = control(&self.map);
        let unread = control.written.load(Ordering::Relaxed).wrapping_sub(self.read);
        unread <= RING as u64 / 2 && is_waited_for(&control.writer_waits)
    }

    /// Says that the guest's next step is waited for, unless it has been made by now; answers whether to wait.
    #[must_use]
    pub fn waits(&self) -> bool {
        let control = control(&self.map);
        wait(&control.reader_waits, || {
            control.written.load(Ordering::Acquire) == self.read && control.turned.load(Ordering::Acquire) == 0
        })
    }
}

fn control(map: &MmapRaw) -> &Control {
    // SAFETY: a mapping begins at a page and has one at least; it lives as long as this borrow. That others write there is what atomics are for.
    unsafe { &*map.as_mut_ptr().cast::<Control>() }
}

/// Where in the ring the byte with that number is.
fn place(number: u64) -> usize {
    // Less than the ring's length.
    (number % RING as u64) as usize
}

fn has_room(free: usize) -> bool {
    free >= SPILL
}

/// What was written before is there before what is written next. For the guest's kernel may let writes to the window be combined, which
/// does not keep them in order as other memory does.
fn publish() {
    fence(Ordering::SeqCst);
}

fn is_waited_for(waits: &AtomicU32) -> bool {
    // What was said before is seen by who says after this that he waits.
    fence(Ordering::SeqCst);
    waits.load(Ordering::Relaxed) != 0 && waits.swap(0, Ordering::AcqRel) != 0
}

fn wait(waits: &AtomicU32, is_needed: impl Fn() -> bool) -> bool {
    if !is_needed() {
        return false;
    }
    waits.store(1, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    let needed = is_needed();
    if !needed {
        waits.store(0, Ordering::Relaxed);
    }
    needed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window() -> (Writer, Reader, File) {
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(SIZE as u64).unwrap();
        let reader = Reader::open(memory.try_clone().unwrap()).unwrap();
        (Writer::open(&memory).unwrap(), reader, memory)
    }

    /// Writes at most `most` of the bytes; answers how many.
    fn write(writer: &mut Writer, bytes: &[u8], most: usize) -> usize {
        let room = writer.room();
        let count = room.len().min(bytes.len()).min(most);
        room[..count].copy_from_slice(&bytes[..count]);
        let _ = writer.wrote(count);
        count
    }

    #[test]
    fn bytes_come_out_as_they_went_in_however_they_lie_in_the_ring() {
        let (mut writer, mut reader, _) = window();
        let sent: Vec<u8> = (0..=250).cycle().take(7 * SIZE).collect();
        let (mut written, mut read) = (0, Vec::new());
        for most in [1, SPILL, 70_001, CHUNK, SIZE].into_iter().cycle() {
            written += write(&mut writer, &sent[written..], most);
            // Sometimes a whole ring is written before anything is read.
            if most == SIZE {
                while reader.step().unwrap() == Some(Step::Bytes) {
                    read.extend_from_slice(reader.bytes());
                }
            }
            if read.len() == sent.len() {
                break;
            }
        }
        assert!(read == sent);
    }

    #[test]
    fn there_is_room_for_a_page_or_none() {
        let (mut writer, mut reader, _) = window();
        let bytes = vec![7; SIZE];
        for fill in [RING - SPILL, RING - SPILL + 1, RING - 1, RING] {
            let mut written = 0;
            while written < fill {
                let count = write(&mut writer, &bytes, fill - written);
                if count == 0 {
                    break;
                }
                written += count;
            }
            assert!(writer.room().is_empty() || writer.room().len() >= SPILL);
            assert_eq!(writer.waits(), writer.room().is_empty());
            while reader.step().unwrap().is_some() {}
            assert!(writer.room().len() >= SPILL);
        }
    }

    #[test]
    fn who_waits_is_woken_once() {
        let (mut writer, mut reader, _) = window();
        assert!(!writer.wrote(10), "nobody waits");
        assert!(!reader.waits(), "there is something");
        assert_eq!(reader.step().unwrap(), Some(Step::Bytes));
        assert_eq!(reader.step().unwrap(), None);
        assert!(reader.waits());
        assert!(writer.wrote(10));
        assert!(!writer.wrote(10), "it has been woken");
        assert!(!writer.waits(), "there is room");
        while !writer.room().is_empty() {
            let length = writer.room().len();
            let _ = writer.wrote(length);
        }
        assert!(writer.waits());
        let mut woken = 0;
        while reader.step().unwrap().is_some() {
            woken += u32::from(reader.frees());
        }
        assert_eq!(woken, 1);
        assert!(reader.waits());
        assert!(writer.turn());
    }

    #[test]
    fn a_turn_comes_after_what_was_written_before_it() {
        let (mut writer, mut reader, memory) = window();
        for _ in 0..2 {
            write(&mut writer, b"before", SIZE);
            assert!(!writer.turn());
            assert_eq!(reader.step().unwrap(), Some(Step::Bytes));
            assert_eq!(reader.bytes(), b"before");
            assert_eq!(reader.step().unwrap(), Some(Step::Turn));
            assert_eq!(reader.step().unwrap(), None);
            // Another one goes on where it was.
            writer = Writer::open(&memory).unwrap();
        }
    }

    #[test]
    fn more_than_the_ring_holds_is_an_error() {
        let (_writer, mut reader, memory) = window();
        for (lie, is_believed) in [(RING as u64, true), (RING as u64 + 1, false), (u64::MAX, false)] {
            memory.write_all_at(&lie.to_ne_bytes(), 0).unwrap();
            assert_eq!(reader.step().is_ok(), is_believed, "{lie}");
            reader.read = 0;
        }
    }

    #[test]
    fn a_host_that_says_what_cannot_be_gives_no_room() {
        let (mut writer, _reader, memory) = window();
        for lie in [1, u64::MAX - RING as u64, RING as u64] {
            memory.write_all_at(&lie.to_ne_bytes(), 8).unwrap();
            assert!(writer.room().len() <= RING);
        }
    }
}
