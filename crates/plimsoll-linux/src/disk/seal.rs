//! Encrypting and decrypting what goes to the disk. `format` says under which nonces, and why each is used once.
//!
//! Enters: bytes, and where they are. Leaves: the same many bytes and a tag, or the refusal of bytes that are not what was
//! written there. What must never happen: a copy of the key that is left behind in memory when its user has gone.
//!
//! So nobody keeps one. The key is taken out of the table's secret page for each use, onto the stack; what cipher and compiler
//! make of it there, on their way, is below the caller's frame, and is overwritten before the caller goes on. That it is, in this
//! build, is what `tests/disk/secret.rs` looks at, from another process.
use super::format::TAG_SIZE;
use chacha20poly1305::aead::{AeadInOut, KeyInit};
use chacha20poly1305::{ChaCha20Poly1305, Nonce, Tag};
use std::hint::black_box;
use zeroize::{Zeroize, Zeroizing};

/// Bytes of a key.
pub(super) const KEY_SIZE: usize = 32;
/// What cipher and authenticator use of the stack is less than a third of it. 8 KiB are overwritten in 0.1 us.
const STACK_SIZE: usize = 8192;

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

/// A key in use.
pub(super) struct Key(Zeroizing<[u8; KEY_SIZE]>);

impl Key {
    /// Does something with the key that is in words elsewhere.
    pub(super) fn with<T>(word: impl Fn(usize) -> u64, work: impl FnOnce(&Self) -> T) -> T {
        let done = in_a_frame(|| {
            let mut key = Self(Zeroizing::new([0; KEY_SIZE]));
            let (words, _) = key.0.as_chunks_mut();
            (0..).zip(words).for_each(|(place, into)| *into = word(place).to_le_bytes());
            work(&key)
        });
        overwrite_stack();
        done
    }

    /// Makes a key of random bytes, and gives it away word by word.
    pub(super) fn fill<E>(
        random: impl FnOnce(&mut [u8]) -> Result<(), E>,
        mut give: impl FnMut(usize, u64),
    ) -> Result<(), E> {
        let made = in_a_frame(|| {
            let mut key = Zeroizing::new([0; KEY_SIZE]);
            random(&mut *key)?;
            let (words, _) = key.as_chunks();
            (0..).zip(words).for_each(|(place, word)| give(place, u64::from_le_bytes(*word)));
            Ok(())
        });
        overwrite_stack();
        made
    }

    fn cipher(&self) -> ChaCha20Poly1305 {
        ChaCha20Poly1305::new((&*self.0).into())
    }

    /// Encrypts the bytes where they are.
    pub(super) fn seal(&self, seat: Seat, bytes: &mut [u8]) -> Option<[u8; TAG_SIZE]> {
        let bound = bound(seat, bytes.len());
        // Fails only for more bytes than 2^38.
        let tag = self.cipher().encrypt_inout_detached(&nonce(seat), &bound, bytes.into()).ok()?;
        Some(tag.into())
    }

    /// Decrypts the bytes where they are. Where this fails they are arbitrary.
    pub(super) fn open(&self, seat: Seat, tag: &[u8; TAG_SIZE], bytes: &mut [u8]) -> Result<(), Forged> {
        let bound = bound(seat, bytes.len());
        let opened =
            self.cipher().decrypt_inout_detached(&nonce(seat), &bound, bytes.into(), &Tag::from(*tag));
        opened.map_err(|_| Forged)
    }
}

/// Below the frame of whoever calls it.
#[inline(never)]
fn in_a_frame<T>(work: impl FnOnce() -> T) -> T {
    work()
}

/// What a call of the same caller has left on the stack is gone.
#[inline(never)]
fn overwrite_stack() {
    let mut below = [0_u8; STACK_SIZE];
    below.zeroize();
    black_box(&below);
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
        let sealer = Key(Zeroizing::new([7; KEY_SIZE]));
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
        let other = Key(Zeroizing::new([8; KEY_SIZE]));
        assert_eq!(other.open(SEAT, &tag, &mut sealed.clone()), Err(Forged));
    }

    #[test]
    fn the_cipher_is_that_of_the_rfc() {
        // RFC 8439, 2.8.2, has other associated data; this is its appendix A.5's key with an empty message here, computed
        // against the crate's own one-shot interface so that nonce and associated data are laid out as `format` says.
        let key = [0x1c; KEY_SIZE];
        let sealer = Key(Zeroizing::new(key));
        let mut sealed = [0x42; 64];
        let tag = sealer.seal(SEAT, &mut sealed).unwrap();
        let nonce = Nonce::from([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
        let mut expected = [0x42; 64];
        let bound = [3, 0, 0, 0, 64, 0, 0, 0];
        let cipher = ChaCha20Poly1305::new(&key.into());
        let expected_tag =
            cipher.encrypt_inout_detached(&nonce, &bound, expected.as_mut_slice().into()).unwrap();
        assert_eq!((sealed, Tag::from(tag)), (expected, expected_tag));
    }
}
