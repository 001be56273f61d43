//! The memory in which output comes, as the state of a template's devices has it. Its content is no part of a template, but QEMU says where in
//! the guest's memory it was, and refuses to restore it where it is not yet: its place is the device's to give, which is restored later.

use coreos_kvm_proto::output_window::SIZE;
use memchr::memmem;

use crate::qemu::arguments::WINDOW;

/// Has the state say of the memory that it was nowhere; answers whether it says something of it.
///
/// What QEMU says of a piece of memory is its name, its length and its place, the latter two of 8 bytes, big endian: `ram_save_setup` in
/// migration/ram.c, with the capability x-ignore-shared.
#[must_use]
pub fn forget_place(state: &mut [u8]) -> bool {
    let head = [b"/", WINDOW.as_bytes(), &(SIZE as u64).to_be_bytes()].concat();
    let place = memmem::find(state, &head).map(|start| start + head.len());
    match place.and_then(|place| state.get_mut(place..place + 8)) {
        Some(place) => {
            place.fill(0);
            true
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_gone_and_all_else_stays() {
        let state = |place: u64| {
            let length = 1_u64 << 20;
            let window = [
                &b"\x130000:00:06.0/window"[..],
                &length.to_be_bytes(),
                &place.to_be_bytes(),
            ]
            .concat();
            [b"QEVM memory".as_slice(), &window, b"rest"].concat()
        };
        let mut saved = state(0xfe80_0000);
        assert!(forget_place(&mut saved));
        assert_eq!(saved, state(0));
        assert!(!forget_place(&mut b"QEVM /window".to_vec()));
        assert!(!forget_place(&mut b"QEVM /window\0\0\0\0\0\x10\0\0".to_vec()));
    }
}
