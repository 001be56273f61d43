//! A guest's memory as a template keeps it: the pages that are not all zero, one after the other, and a map of where they belong
//! with a checksum of each run. What is zero takes no room, and none in a clone either until the guest writes there.

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::AsFd, unix::fs::FileExt},
};

use rustix::fs::SeekFrom;

/// What a clone has in place of what its template had: where in memory, in bytes from its beginning, and what.
pub type Change = (u64, Vec<u8>);

/// Bytes of a page of the guest: what is kept or left out.
const PAGE: usize = 4096;
/// Longest run, in pages, and with it the most that is read at once: 1 MiB.
const RUN_MAX: usize = 256;
const CHUNK: usize = RUN_MAX * PAGE;
/// Bytes of an id that a clone has another one of.
pub const ID: usize = 16;
/// A mark occurs some dozen times, in the kernel and in each service that asked for it. A guest could have any number of them.
const PLACES_MAX: usize = 1024;

/// Pages that follow each other, in memory and in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    page: u64,
    count: u32,
    crc: u32,
}

/// Bytes of a run in the map: page, count and checksum, little-endian.
const RUN: usize = 16;

/// Where the kept pages belong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Map(Vec<Run>);

impl Map {
    /// Bytes of memory that it covers.
    pub(super) fn bytes(&self) -> u64 {
        self.0.iter().map(|run| u64::from(run.count) * PAGE as u64).sum()
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.len() * RUN);
        for run in &self.0 {
            bytes.extend(run.page.to_le_bytes());
            bytes.extend(run.count.to_le_bytes());
            bytes.extend(run.crc.to_le_bytes());
        }
        bytes
    }

    /// None where it is no map of a memory of `size` bytes.
    pub(super) fn decode(bytes: &[u8], size: u64) -> Option<Self> {
        let mut runs = Vec::with_capacity(bytes.len() / RUN);
        let (chunks, rest) = bytes.as_chunks::<RUN>();
        let mut end = 0;
        for chunk in chunks {
            let run = Run {
                page: u64::from_le_bytes(chunk[..8].try_into().ok()?),
                count: u32::from_le_bytes(chunk[8..12].try_into().ok()?),
                crc: u32::from_le_bytes(chunk[12..].try_into().ok()?),
            };
            if run.page < end || !(1..=RUN_MAX as u32).contains(&run.count) {
                return None;
            }
            end = run.page.checked_add(run.count.into())?;
            runs.push(run);
        }
        (rest.is_empty() && end.checked_mul(PAGE as u64)? <= size).then_some(Self(runs))
    }

    /// Compares `data` with the checksums.
    pub(super) fn verify(&self, data: &File) -> io::Result<()> {
        self.each(data, |_, _| Ok(()))
    }

    /// Calls `take` for each run, with its place in memory and its content, which was checked.
    pub(super) fn each(&self, data: &File, take: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        self.each_by(data, &mut vec![0; CHUNK], take)
    }

    /// The same without allocating anything.
    fn each_by(
        &self,
        data: &File,
        buffer: &mut [u8],
        mut take: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        // What of the file is in the buffer: its first byte's place, and the number.
        let (mut begin, mut filled) = (0, 0);
        let mut at = 0;
        for run in &self.0 {
            let length = run.count as usize * PAGE;
            if at + length as u64 > begin + filled as u64 {
                (begin, filled) = (at, fill(data, buffer, at)?);
            }
            let offset = (at - begin) as usize;
            let content = buffer[..filled].get(offset..offset + length).ok_or_else(damage)?;
            if crc32fast::hash(content) != run.crc {
                return Err(damage());
            }
            take(run.page * PAGE as u64, content)?;
            at += length as u64;
        }
        Ok(())
    }
}

/// Reads as much as there is and has room.
fn fill(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// An error of the system, for it has to come through where a process is started: only its number does.
fn damage() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADMSG)
}

/// Whether the memory is not the one that was saved, and not merely unreadable.
pub fn is_damage(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADMSG)
}

/// What [`save`] has found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Saved {
    pub map: Map,
    /// For each mark that was looked for: where it is, in bytes from the memory's beginning.
    pub places: Vec<Vec<u64>>,
}

/// Writes the pages of `memory` that are not zero to `out`, and looks on the way for `marks`, of [`ID`] bytes at most, which a clone has
/// others of. Nobody may write to the memory meanwhile.
///
/// # Errors
/// Of reading and writing, and when a mark is all over the memory.
pub fn save(memory: &File, size: u64, out: &mut impl Write, marks: &[&[u8]]) -> io::Result<Saved> {
    let mut saved = Saved {
        map: Map::default(),
        places: vec![Vec::new(); marks.len()],
    };
    // Before each chunk the end of the one before, where a mark may begin.
    let mut buffer = vec![0; ID + CHUNK];
    let mut at = 0;
    while let Some(next) = next_data(memory, at)? {
        at = next - next % CHUNK as u64;
        if at >= size {
            break;
        }
        let overlap = (ID as u64).min(at) as usize;
        let length = CHUNK.min((size - at) as usize);
        let filled = fill(memory, &mut buffer[..overlap + length], at - overlap as u64)?;
        if filled != overlap + length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (mark, places) in marks.iter().zip(&mut saved.places) {
            look_for(mark, &buffer[..filled], at - overlap as u64, places)?;
        }
        keep(&buffer[overlap..filled], at / PAGE as u64, &mut saved.map, out)?;
        at += length as u64;
    }
    Ok(saved)
}

/// Where the next data is, at or behind `at`: lseek(2), SEEK_DATA.
fn next_data(memory: &File, at: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(memory.as_fd(), SeekFrom::Data(at)) {
        Ok(next) => Ok(Some(next)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn look_for(mark: &[u8], bytes: &[u8], begin: u64, places: &mut Vec<u64>) -> io::Result<()> {
    for found in memchr::memmem::find_iter(bytes, mark) {
        let place = begin + found as u64;
        // One in the overlap was found before.
        if places.last().is_none_or(|last| *last < place) {
            places.push(place);
        }
        if places.len() > PLACES_MAX {
            return Err(io::Error::other(format!(
                "the guest has one of its ids in more than {PLACES_MAX} places, which no guest has that was booted in good faith"
            )));
        }
    }
    Ok(())
}

/// Keeps the pages of `chunk` that are not zero; the first has the number `first`.
fn keep(chunk: &[u8], first: u64, map: &mut Map, out: &mut impl Write) -> io::Result<()> {
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut pages = chunk.chunks(PAGE).enumerate().peekable();
    while let Some((start, page)) = pages.next() {
        if is_zero(page) {
            continue;
        }
        let mut end = start + 1;
        while pages.next_if(|(_, page)| !is_zero(page)).is_some() {
            end += 1;
        }
        let content = &chunk[start * PAGE..(end * PAGE).min(chunk.len())];
        map.0.push(Run {
            page: first + start as u64,
            count: (end - start) as u32,
            crc: crc32fast::hash(content),
        });
        out.write_all(content)?;
    }
    Ok(())
}

/// Fills a clone's memory. Everything is allocated beforehand, so that the clone's own process can do it, behind its wall and
/// on its own account, before it becomes QEMU.
#[derive(Debug)]
pub struct Filler {
    map: Map,
    data: File,
    memory: File,
    buffer: Vec<u8>,
}

impl Filler {
    /// For `memory`, which is as large as the template's, and zero.
    pub fn new(map: Map, data: File, memory: File) -> Self {
        Self {
            map,
            data,
            memory,
            buffer: vec![0; CHUNK],
        }
    }

    /// Copies, and checks what it copies. Allocates nothing and takes no lock.
    ///
    /// # Errors
    /// Of reading and writing, as numbers of the system; see [`is_damage`].
    pub fn fill(&mut self) -> io::Result<()> {
        let memory = &self.memory;
        self.map.each_by(&self.data, &mut self.buffer, |place, content| {
            memory.write_all_at(content, place)
        })
    }
}

/// Changes a clone's own memory.
///
/// # Errors
/// Of writing.
pub fn change(memory: &File, changes: &[Change]) -> io::Result<()> {
    changes
        .iter()
        .try_for_each(|(place, content)| memory.write_all_at(content, *place))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 4 << 20;
    const ID_A: [u8; ID] = *b"0123456789abcdef";

    /// A memory with some pages, and an id across the end of a chunk.
    fn memory() -> File {
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(SIZE).unwrap();
        for page in [0, 1, 2, 300, 302, 1023] {
            memory
                .write_all_at(&[page as u8 | 1; PAGE], page * PAGE as u64)
                .unwrap();
        }
        memory.write_all_at(&ID_A, CHUNK as u64 - 5).unwrap();
        memory.write_all_at(&ID_A, 7 * PAGE as u64).unwrap();
        memory
    }

    fn content(file: &File) -> Vec<u8> {
        let mut content = vec![0; SIZE as usize];
        file.read_exact_at(&mut content, 0).unwrap();
        content
    }

    fn saved() -> (Saved, File) {
        let mut data = tempfile::tempfile().unwrap();
        let saved = save(&memory(), SIZE, &mut data, &[&ID_A, &[9; 6]]).unwrap();
        (saved, data)
    }

    #[test]
    fn a_clone_has_the_templates_memory_but_for_the_ids() {
        let (saved, data) = saved();
        assert_eq!(saved.places, [vec![7 * PAGE as u64, CHUNK as u64 - 5], vec![]]);
        assert_eq!(saved.map.bytes(), data.metadata().unwrap().len());
        assert_eq!(saved.map.bytes(), 9 * PAGE as u64);

        let clone = tempfile::tempfile().unwrap();
        clone.set_len(SIZE).unwrap();
        Filler::new(saved.map, data, clone.try_clone().unwrap()).fill().unwrap();
        let changes: Vec<_> = saved.places[0]
            .iter()
            .map(|place| (*place, b"fedcba9876543210".to_vec()))
            .collect();
        change(&clone, &changes).unwrap();
        let mut expected = content(&memory());
        for place in &saved.places[0] {
            expected[*place as usize..][..ID].copy_from_slice(b"fedcba9876543210");
        }
        assert!(content(&clone) == expected);
    }

    #[test]
    fn one_bit_is_noticed_and_so_is_a_missing_end() {
        let (saved, data) = saved();
        saved.map.verify(&data).unwrap();
        let mut byte = [0];
        data.read_exact_at(&mut byte, 5000).unwrap();
        data.write_all_at(&[byte[0] ^ 4], 5000).unwrap();
        assert!(is_damage(&saved.map.verify(&data).unwrap_err()));
        data.write_all_at(&byte, 5000).unwrap();
        saved.map.verify(&data).unwrap();
        data.set_len(saved.map.bytes() - 1).unwrap();
        assert!(is_damage(&saved.map.verify(&data).unwrap_err()));
    }

    #[test]
    fn a_map_is_read_as_it_was_written_and_fits_its_memory() {
        let map = saved().0.map;
        assert_eq!(Map::decode(&map.encode(), SIZE), Some(map.clone()));
        assert_eq!(Map::decode(&map.encode(), SIZE - PAGE as u64), None);
        assert_eq!(Map::decode(&map.encode()[1..], SIZE), None);
        let twice = [map.encode(), map.encode()].concat();
        assert_eq!(Map::decode(&twice, SIZE), None);
    }

    #[test]
    fn an_id_that_is_everywhere_is_refused() {
        let memory = tempfile::tempfile().unwrap();
        memory.write_all_at(&ID_A.repeat(CHUNK / ID), 0).unwrap();
        let error = save(&memory, CHUNK as u64, &mut io::sink(), &[&ID_A]).unwrap_err();
        assert!(error.to_string().contains("more than 1024 places"), "{error}");
    }
}
