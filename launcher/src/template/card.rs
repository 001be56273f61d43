//! The network card that a template has and its clones have, too. Its address is in the state of the template's devices, and in the
//! memory of its guest, whose driver has asked the card for it; a clone has its own in all these places.

use memchr::memmem;

use crate::mac::Mac;

/// The address in templates. Locally administered, and of bytes that nothing else consists of.
pub const TEMPLATE_MAC: Mac = Mac(*b"\x02KC\xc5\x9a\x6d");

/// Whether a template whose devices have that state can be cloned.
pub fn has_card(state: &[u8]) -> bool {
    memmem::find(state, &TEMPLATE_MAC.0).is_some()
}

/// Gives the card the address `mac`; answers whether there is one.
#[must_use]
pub fn give_address(state: &mut [u8], mac: Mac) -> bool {
    let places: Vec<_> = memmem::find_iter(state, &TEMPLATE_MAC.0).collect();
    for place in &places {
        state[*place..place + mac.0.len()].copy_from_slice(&mac.0);
    }
    !places.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_has_its_own_address_wherever_its_template_has_its() {
        let mac = Mac([2, 0x11, 0x22, 0x33, 0x44, 0x55]);
        let state = |mac: Mac| [b"virtio-net".as_slice(), &mac.0, b"config", &mac.0, b"end"].concat();
        let mut clone = state(TEMPLATE_MAC);
        assert!(has_card(&clone));
        assert!(give_address(&mut clone, mac));
        assert_eq!(clone, state(mac));
        assert!(!has_card(&clone));
        assert!(!give_address(&mut clone, mac));
    }
}
