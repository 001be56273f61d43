//! The BPF program that gives the connections to a namespace's loopback to one socket, by bpf(2) itself: it is too small for a
//! compiler and a loader. The numbers in it are little-endian, as the processors are that QEMU is started for.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

// linux/bpf.h: commands, types of maps and programs, helpers.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
const SK_PASS: i32 = 1;
const BPF_PSEUDO_MAP_FD: u8 = 1;

/// Offset of a jump that is to lead to the end.
const TO_PASS: i16 = i16::MAX;

// Offsets in `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high half.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Attaches the program to the network namespace, until the descriptor that is answered is closed.
pub(super) fn give_loopback_to(socket: BorrowedFd<'_>, netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let map = create_map()?;
    insert(&map, socket)?;
    let program = load(&program(map.as_raw_fd()))?;
    attach(&program, netns)
}

/// The program, with its one socket in a map.
///
/// ```text
///   if protocol != TCP: pass
///   if family == AF_INET: if the first byte of the local address is not 127: pass
///   else if the local address is not ::1: pass
///   if there is a socket in the map: assign it, release it
///   pass
/// ```
fn program(map: RawFd) -> Vec<Instruction> {
    const R0: u8 = 0;
    const R1: u8 = 1;
    const R2: u8 = 2;
    const R3: u8 = 3;
    const R6: u8 = 6;
    const R7: u8 = 7;
    const R10: u8 = 10;
    let instruction = |code, to: u8, from: u8, offset, immediate| Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    };
    let mov = |to, from| instruction(0xbf, to, from, 0, 0);
    let set = |to, value| instruction(0xb7, to, 0, 0, value);
    let load = |to, offset| instruction(0x61, to, R6, offset, 0);
    // To the end, wherever that comes to be.
    let pass_unless = |register, value| instruction(0x55, register, 0, TO_PASS, value);
    let call = |helper| instruction(0x85, 0, 0, 0, helper);
    let mut all = vec![
        mov(R6, R1),
        load(R2, PROTOCOL),
        pass_unless(R2, libc::IPPROTO_TCP),
        load(R2, FAMILY),
        instruction(0x55, R2, 0, 4, libc::AF_INET),
        // The address as it is in the packet: its first byte is the lowest of a little-endian word.
        load(R2, LOCAL_IP4),
        instruction(0x57, R2, 0, 0, 0xff),
        pass_unless(R2, 127),
        instruction(0x05, 0, 0, 8, 0),
    ];
    for (offset, wanted) in [(0, 0), (4, 0), (8, 0), (12, i32::from_ne_bytes([0, 0, 0, 1]))] {
        all.extend([load(R2, LOCAL_IP6 + offset), pass_unless(R2, wanted)]);
    }
    all.extend([
        // The socket is the map's first, at key 0.
        instruction(0x62, R10, 0, -4, 0),
        mov(R2, R10),
        instruction(0x07, R2, 0, 0, -4),
        instruction(0x18, R1, BPF_PSEUDO_MAP_FD, 0, map),
        instruction(0, 0, 0, 0, 0),
        call(MAP_LOOKUP_ELEM),
        instruction(0x15, R0, 0, TO_PASS, 0),
        mov(R7, R0),
        mov(R1, R6),
        mov(R2, R7),
        set(R3, 0),
        call(SK_ASSIGN),
        mov(R1, R7),
        call(SK_RELEASE),
    ]);
    let pass = all.len();
    for (index, instruction) in all.iter_mut().enumerate() {
        if instruction.offset == TO_PASS {
            // Some thirty instructions at most.
            instruction.offset = i16::try_from(pass - index - 1).unwrap_or_default();
        }
    }
    all.extend([set(R0, SK_PASS), instruction(0x95, 0, 0, 0, 0)]);
    all
}

fn create_map() -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        map_flags: u32,
    }
    descriptor(
        BPF_MAP_CREATE,
        &Attributes {
            map_type: BPF_MAP_TYPE_SOCKMAP,
            key_size: 4,
            value_size: 8,
            max_entries: 1,
            map_flags: 0,
        },
    )
}

fn insert(map: &OwnedFd, socket: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        map: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let (key, value) = (0_u32, u64::from(number(socket.as_raw_fd())?));
    bpf(
        BPF_MAP_UPDATE_ELEM,
        &Attributes {
            map: number(map.as_raw_fd())?,
            padding: 0,
            key: address(&raw const key),
            value: address(&raw const value),
            flags: 0,
        },
    )
    .map(drop)
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    /// Up to `expected_attach_type`.
    #[repr(C)]
    struct Attributes {
        program_type: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        expected_attach_type: u32,
    }
    descriptor(
        BPF_PROG_LOAD,
        &Attributes {
            program_type: BPF_PROG_TYPE_SK_LOOKUP,
            instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
            instructions: address(program.as_ptr()),
            license: address(c"Apache-2.0".as_ptr()),
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name: *b"pod_loopback\0\0\0\0",
            interface: 0,
            expected_attach_type: BPF_SK_LOOKUP,
        },
    )
}

fn attach(program: &OwnedFd, netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    descriptor(
        BPF_LINK_CREATE,
        &Attributes {
            program: number(program.as_raw_fd())?,
            target: number(netns.as_raw_fd())?,
            attach_type: BPF_SK_LOOKUP,
            flags: 0,
        },
    )
}

fn number(descriptor: RawFd) -> io::Result<u32> {
    u32::try_from(descriptor).map_err(io::Error::other)
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

fn descriptor<A>(command: libc::c_int, attributes: &A) -> io::Result<OwnedFd> {
    let made = bpf(command, attributes)?;
    let raw = RawFd::try_from(made).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it for this process; those of bpf(2) are closed on exec.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn bpf<A>(command: libc::c_int, attributes: &A) -> io::Result<libc::c_long> {
    // SAFETY: the structure is the beginning of the command's part of `union bpf_attr`, without padding that is not named, as long as
    // the size says; what it points to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<A>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
