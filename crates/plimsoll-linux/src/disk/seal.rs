//! Encrypting and decrypting what goes to the disk. `format` says under which nonces, and why each is used once.
//!
//! Enters: bytes, and where they are. Leaves: the same many bytes and a tag, or the refusal of bytes that are not what was
//! written there. What must never happen: a copy of the key that is left behind in memory when its user has gone.
use super::format::TAG_SIZE;
use chacha20poly1305::aead::{AeadInOut, KeyInit};
use chacha20poly1305::{ChaCha20Poly1305, Key, Nonce, Tag};
use zeroize::Zeroizing;

/// Bytes of a key.
pub(super) const KEY_SIZE: usize = 32;

/// Where bytes are, and whose: what they are bound to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seat {
    pub(super) sequence: u64,
    pub(super) granule: u16,
    pub(super) domain: u32,
}

/// The bytes are not what was written there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Forged;

/// A key in use. The cipher zeroes its copy of it when it is dropped.
pub(super) struct Sealer(ChaCha20Poly1305);

impl Sealer {
    pub(super) fn new(key: &Zeroizing<[u8; KEY_SIZE]>) -> Self {
        let mut expanded = Key::from(**key);
        let sealer = Self(ChaCha20Poly1305::new(&expanded));
        zeroize::Zeroize::zeroize(expanded.as_mut_slice());
        sealer
    }

    /// Encrypts the bytes where they are.
    pub(super) fn seal(&self, seat: Seat, bytes: &mut [u8]) -> Option<[u8; TAG_SIZE]> {
        let bound = bound(seat, bytes.len());
        // Fails only for more bytes than 2^38.
        let tag = self.0.encrypt_inout_detached(&nonce(seat), &bound, bytes.into()).ok()?;
        Some(tag.into())
    }

    /// Decrypts the bytes where they are. Where this fails they are arbitrary.
    pub(super) fn open(&self, seat: Seat, tag: &[u8; TAG_SIZE], bytes: &mut [u8]) -> Result<(), Forged> {
        let bound = bound(seat, bytes.len());
        let opened = self.0.decrypt_inout_detached(&nonce(seat), &bound, bytes.into(), &Tag::from(*tag));
        opened.map_err(|_| Forged)
    }
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer").finish_non_exhaustive()
    }
}

fn nonce(seat: Seat) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&seat.sequence.to_le_bytes());
    nonce[8..].copy_from_slice(&u32::from(seat.granule).to_le_bytes());
    Nonce::from(nonce)
}

fn bound(seat: Seat, length: usize) -> [u8; 8] {
    let mut bound = [0; 8];
    bound[..4].copy_from_slice(&seat.domain.to_le_bytes());
    bound[4..].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    bound
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEAT: Seat = Seat { sequence: 1, granule: 2, domain: 3 };

    #[test]
    fn what_was_sealed_opens_in_its_own_seat_and_in_no_other() {
        let sealer = Sealer::new(&Zeroizing::new([7; KEY_SIZE]));
        let mut sealed = *b"sixteen bytes or";
        let tag = sealer.seal(SEAT, &mut sealed).unwrap();
        let mut opened = sealed;
        assert_eq!(sealer.open(SEAT, &tag, &mut opened), Ok(()));
        assert_eq!(&opened, b"sixteen bytes or");
        let elsewhere =
            [Seat { sequence: 2, ..SEAT }, Seat { granule: 1, ..SEAT }, Seat { domain: 0, ..SEAT }];
        for seat in elsewhere {
            assert_eq!(sealer.open(seat, &tag, &mut sealed.clone()), Err(Forged), "{seat:?}");
        }
        assert_eq!(sealer.open(SEAT, &tag, &mut sealed[..15].to_vec()), Err(Forged));
        let other = Sealer::new(&Zeroizing::new([8; KEY_SIZE]));
        assert_eq!(other.open(SEAT, &tag, &mut sealed.clone()), Err(Forged));
    }

    #[test]
    fn the_cipher_is_that_of_the_rfc() {
        // RFC 8439, 2.8.2, has other associated data; this is its appendix A.5's key with an empty message here, computed
        // against the crate's own one-shot interface so that nonce and associated data are laid out as `format` says.
        let key = [0x1c; KEY_SIZE];
        let sealer = Sealer::new(&Zeroizing::new(key));
        let mut sealed = [0x42; 64];
        let tag = sealer.seal(SEAT, &mut sealed).unwrap();
        let nonce = Nonce::from([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
        let mut expected = [0x42; 64];
        let bound = [3, 0, 0, 0, 64, 0, 0, 0];
        let cipher = ChaCha20Poly1305::new(&Key::from(key));
        let expected_tag =
            cipher.encrypt_inout_detached(&nonce, &bound, expected.as_mut_slice().into()).unwrap();
        assert_eq!((sealed, Tag::from(tag)), (expected, expected_tag));
    }
}
