//! A guest of a dozen instructions, timed: whether KVM runs it on the processor or emulates it.
//!
//! The guest is in long mode, for that is what a kernel runs in, and counts down [`ITERATIONS`] times two instructions
//! before each of [`SLICES`] exits by port output: 2,000,000 simple instructions in all, under 2 ms on any processor that
//! can run KVM. The fastest slice counts, so that a host busy with other work does not make a processor look like an
//! emulator; and after three slow ones there is nothing more to learn.

use std::{fmt, time::Instant};

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use serde::{Deserialize, Serialize};

/// Rounds of the loop in one slice; each is a decrement and a jump.
const ITERATIONS: u32 = 100_000;
const SLICES: usize = 10;
/// A slice takes a processor 0.03 to 0.1 ms; an emulating KVM was measured at 120 ms.
const SLICE_LIMIT_US: u64 = 5_000;

/// What the trial showed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// Its fastest slice took so many microseconds.
    Fast { slice_us: u64 },
    /// The same, and that is too long for a processor.
    Slow { slice_us: u64 },
    /// The guest did not run: why.
    Failed(String),
}

impl Verdict {
    /// Whether guests can be run by this KVM.
    pub fn is_usable(&self) -> bool {
        matches!(self, Self::Fast { .. })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let instructions = 2 * ITERATIONS;
        match self {
            Self::Fast { slice_us } => write!(
                f,
                "KVM ran {instructions} instructions of a trial guest in {slice_us} µs"
            ),
            Self::Slow { slice_us } => write!(
                f,
                "/dev/kvm only emulates: {instructions} instructions of a trial guest took {slice_us} µs, where a processor needs under 100"
            ),
            Self::Failed(reason) => write!(f, "KVM does not run a trial guest: {reason}"),
        }
    }
}

/// Runs the trial; blocks for as long as it takes, some milliseconds at best.
pub fn run() -> Verdict {
    match timed() {
        Ok(slice_us) if slice_us <= SLICE_LIMIT_US => Verdict::Fast { slice_us },
        Ok(slice_us) => Verdict::Slow { slice_us },
        Err(reason) => Verdict::Failed(reason),
    }
}

// The guest's memory: page tables, then the code. 2 MiB, mapped one to one by a single large page.
const MEMORY: usize = 0x20_0000;
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PAGE_DIRECTORY: usize = 0x3000;
const CODE: usize = 0x4000;

/// Port to which the guest writes after each slice.
const PORT: u8 = 0x80;

/// `again: mov ecx, ITERATIONS; count: dec ecx; jnz count; out PORT, al; jmp again`
fn program() -> [u8; 13] {
    let [a, b, c, d] = ITERATIONS.to_le_bytes();
    #[rustfmt::skip]
    let code = [
        0xb9, a, b, c, d,
        0xff, 0xc9,
        0x75, 0xfc,
        0xe6, PORT,
        0xeb, 0xf3,
    ];
    code
}

/// Microseconds of the fastest slice.
fn timed() -> Result<u64, String> {
    let failed = |what: &'static str| move |error: kvm_ioctls::Error| format!("{what} failed: {error}");
    let mut memory = Memory::new();
    let kvm = Kvm::new().map_err(failed("opening /dev/kvm"))?;
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.address(),
    };
    // SAFETY: `memory` has MEMORY bytes from the region's address on, which is a page's first. It is declared before the VM
    // and hence outlives it; the VM and its virtual processor run only inside this function, which leaves `memory` alone.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;

    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let segment = |code: bool| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: if code { 8 } else { 16 },
        type_: if code { 11 } else { 3 },
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(code),
        db: u8::from(!code),
        ..Default::default()
    };
    sregs.cs = segment(true);
    for data in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *data = segment(false);
    }
    sregs.idt = kvm_dtable::default();
    sregs.cr3 = PML4 as u64;
    sregs.cr4 |= 1 << 5; // PAE
    sregs.cr0 |= 1 << 31 | 1; // paging, protected mode
    sregs.efer |= 1 << 10 | 1 << 8; // long mode: active, enabled
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        rip: CODE as u64,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;

    let mut fastest = u64::MAX;
    for slice in 0..SLICES {
        let begin = Instant::now();
        match vcpu.run().map_err(failed("KVM_RUN"))? {
            VcpuExit::IoOut(port, _) if port == u16::from(PORT) => {}
            exit => return Err(format!("the trial guest stopped unexpectedly: {exit:?}")),
        }
        fastest = fastest.min(u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX));
        if slice >= 2 && fastest > SLICE_LIMIT_US {
            break;
        }
    }
    Ok(fastest)
}

/// The guest's memory, page tables and code in place.
struct Memory {
    /// One page more than the guest has, for the guest's first byte has to be the first of a page.
    bytes: Vec<u8>,
    start: usize,
}

impl Memory {
    fn new() -> Self {
        const PAGE: usize = 4096;
        let bytes = vec![0; MEMORY + PAGE];
        let start = bytes.as_ptr().align_offset(PAGE);
        let mut memory = Self { bytes, start };
        // Present and writable; the page directory's entry is a page of 2 MiB.
        memory.write(PML4, &(PDPT as u64 | 3).to_le_bytes());
        memory.write(PDPT, &(PAGE_DIRECTORY as u64 | 3).to_le_bytes());
        memory.write(PAGE_DIRECTORY, &(3u64 | 1 << 7).to_le_bytes());
        memory.write(CODE, &program());
        memory
    }

    /// Where the guest's first byte is in this process.
    fn address(&mut self) -> u64 {
        self.bytes[self.start..].as_mut_ptr() as u64
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[self.start + at..][..bytes.len()].copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_a_reason_that_an_admin_understands() {
        assert_eq!(
            Verdict::Slow { slice_us: 120_000 }.to_string(),
            "/dev/kvm only emulates: 200000 instructions of a trial guest took 120000 µs, where a processor needs under 100"
        );
        assert!(!Verdict::Slow { slice_us: 120_000 }.is_usable());
        assert!(Verdict::Fast { slice_us: 60 }.is_usable());
    }

    #[test]
    fn the_trial_ends() {
        let begin = Instant::now();
        let verdict = run();
        assert!(begin.elapsed().as_secs() < 5, "{verdict}");
    }
}
