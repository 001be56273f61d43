//! Memory that nobody uses is made zero before a guest is saved, for zeros are not stored. It is what the kernel lets a process
//! have: this one takes all of it, which the kernel clears, and gives it back.

use std::{ffi::c_void, fs, num::NonZeroUsize, ptr::NonNull};

use anyhow::{Context as _, Result};
use nix::{
    sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap},
    unistd::{SysconfVar, sysconf},
};

const MEMINFO: &str = "/proc/meminfo";
const ZONEINFO: &str = "/proc/zoneinfo";
const MIN_FREE: &str = "/proc/sys/vm/min_free_kbytes";

/// What the kernel keeps free meanwhile for those of its allocations that cannot wait, in KiB. For transparent huge pages it keeps
/// tens of MiB, which would stay as they are.
const MIN_FREE_KIB: &str = "1024";

/// Less is not worth taking, in bytes.
const LEAST: usize = 512 << 10;

/// Drops what the kernel only keeps to be faster, and makes free memory zero.
pub(crate) fn clear() -> Result<()> {
    nix::unistd::sync();
    let usual = fs::read_to_string(MIN_FREE).context("asking what is kept free")?;
    fs::write(MIN_FREE, MIN_FREE_KIB).context("keeping less free")?;
    // Two rounds: the first frees what holds on to more.
    for _ in 0..2 {
        fs::write("/proc/sys/vm/drop_caches", "3").context("dropping caches")?;
        zero()?;
    }
    fs::write(MIN_FREE, usual.trim()).context("keeping free what was kept before")?;
    let _ = fs::write("/proc/sys/vm/compact_memory", "1");
    Ok(())
}

fn zero() -> Result<()> {
    let reserved = reserved()?;
    let mut parts = Vec::new();
    loop {
        // Half of it, and then it is looked at again, for others take memory as well. Who takes what is reserved has the kernel look
        // for somebody to kill: this process, which has most.
        let part = free()?.saturating_sub(reserved) / 2;
        match NonZeroUsize::new(part) {
            Some(length) if part >= LEAST => parts.push(Part::take(length)?),
            _ => return Ok(()),
        }
    }
}

/// A part of the free memory.
struct Part(NonNull<c_void>, NonZeroUsize);

impl Part {
    fn take(length: NonZeroUsize) -> Result<Self> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping where the kernel likes, which nobody knows of.
        let mapping = unsafe { mmap_anonymous(None, length, access, flags) };
        Ok(Self(mapping.context("taking free memory")?, length))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's alone.
        let _ = unsafe { munmap(self.0, self.1.get()) };
    }
}

/// Memory that nobody has, in bytes.
fn free() -> Result<usize> {
    let text = fs::read_to_string(MEMINFO).context("asking for the free memory")?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemFree:")?.trim().strip_suffix(" kB"));
    let kib: usize = kib
        .with_context(|| format!("{MEMINFO} does not tell the free memory"))?
        .parse()?;
    Ok(kib << 10)
}

/// Free memory that no process gets, in bytes.
fn reserved() -> Result<usize> {
    let page = sysconf(SysconfVar::PAGE_SIZE)?.context("pages have a size")?;
    let text = fs::read_to_string(ZONEINFO).context("asking for the reserves")?;
    Ok(reserved_pages(&text) * usize::try_from(page)?)
}

/// Of each zone, as the kernel reckons its reserves (`calculate_totalreserve_pages` in mm/page_alloc.c): the high watermark, and
/// what is kept for those who can use no other zone.
fn reserved_pages(zoneinfo: &str) -> usize {
    let number = |text: &str| text.trim().parse::<usize>().unwrap_or_default();
    let of_line = |line: &str| {
        let line = line.trim();
        match (line.strip_prefix("high "), line.strip_prefix("protection: (")) {
            (Some(high), _) => number(high),
            (_, Some(kept)) => kept
                .trim_end_matches(')')
                .split(',')
                .map(number)
                .max()
                .unwrap_or_default(),
            _ => 0,
        }
    };
    zoneinfo.lines().map(of_line).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserves_are_those_of_all_zones() {
        let text = "Node 0, zone      DMA\n  pages free     738\n        boost    0\n        min      190\n        low      237\n        \
                    high     284\n        spanned  4095\n        protection: (0, 549, 549)\n  pagesets\n    cpu: 0\n              \
                    count: 0\n              high:  14\nNode 0, zone    DMA32\n  pages free     6960\n        high     10460\n        \
                    protection: (0, 0, 0)\n";
        assert_eq!(reserved_pages(text), 284 + 549 + 10460);
    }

    #[test]
    fn a_machine_tells_what_is_free_and_reserved() {
        assert!(free().unwrap() > 0 && reserved().unwrap() > 0);
    }
}
