//! Inputs made of what is right with a few changes each, the same from the same seed.
use plimsoll_guest::random::Rng;

/// Bytes that mean something to one parser or another.
const TELLING: [u8; 16] = *b"\0\x01\x7f\x80\xff09af-=:\n\" [";

/// One of the examples, of which there is at least one, with a few changes.
pub fn changed(examples: &[Vec<u8>], random: &mut Rng) -> Vec<u8> {
    let mut bytes = examples[below(random, examples.len())].clone();
    change(&mut bytes, random);
    bytes
}

/// One below `limit`, which is not 0.
fn below(random: &mut Rng, limit: usize) -> usize {
    usize::try_from(random.word() % limit as u64).unwrap_or(0)
}

/// Changes a few things.
fn change(bytes: &mut Vec<u8>, random: &mut Rng) {
    for _ in 0..=below(random, 4) {
        if bytes.is_empty() {
            bytes.push(0);
        }
        let at = below(random, bytes.len());
        match below(random, 6) {
            0 => bytes[at] ^= 1 << below(random, 8),
            1 => bytes[at] = TELLING[below(random, TELLING.len())],
            2 => bytes.truncate(at),
            3 => bytes.insert(at, TELLING[below(random, TELLING.len())]),
            4 => {
                // A part once more, somewhere else.
                let end = at + below(random, bytes.len() - at + 1).min(64);
                let part = bytes[at..end].to_vec();
                let to = below(random, bytes.len());
                bytes.splice(to..to, part);
            }
            _ => {
                // A number at its limit.
                let number = [0, u64::MAX, 1 << 63, u64::MAX >> 1][below(random, 4)].to_le_bytes();
                let end = (at + [4, 8][below(random, 2)]).min(bytes.len());
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
        }
    }
}
