//! The allocator whose words guest and host share, from the host's side: a frame is taken only when its word says that it is free,
//! and nothing but that word changes.
use super::words_of;
use plimsoll_guest::frames::{Cursor, Frames, Take, Taken, Words};

struct Shared<'a>(&'a mut [u64]);

impl Words for Shared<'_> {
    fn load(&mut self, word: u64) -> u64 {
        usize::try_from(word).ok().and_then(|word| self.0.get(word).copied()).unwrap_or(0)
    }

    fn exchange(&mut self, word: u64, current: u64, new: u64) -> Result<(), u64> {
        let place = usize::try_from(word).ok().and_then(|word| self.0.get_mut(word));
        let place = place.unwrap_or_else(|| panic!("word {word} is beyond what was shared"));
        if *place == current {
            *place = new;
            return Ok(());
        }
        Err(*place)
    }
}

/// More frames show nothing more.
const FRAMES_MAX: usize = 16;

/// Reads words, each of a frame.
pub(crate) fn read(bytes: &[u8]) -> bool {
    let mut words = words_of(bytes);
    words.truncate(FRAMES_MAX);
    let count = words.len() as u64;
    let mut has_taken = false;
    // The frame after the last one is asked for, too.
    for frame in 0..=count {
        for take in [Take::Softly, Take::ForGood] {
            let mut shared = words.clone();
            let mut frames = Frames::new(Shared(&mut shared), count);
            let before = frames.entry(frame);
            let taken = frames.take(frame, take);
            let after = frames.entry(frame);
            if let Some(taken) = taken {
                assert!(frame < count && before.is_free() && !after.is_installed(), "{before:?} {after:?}");
                assert_eq!(taken == Taken::Installed, before.is_installed());
                has_taken = true;
            } else {
                assert_eq!(before, after);
            }
            if taken.is_some() && take == Take::ForGood {
                assert!(!after.is_free());
                assert_eq!(frames.give_back(frame), Ok(()));
                assert!(frames.give_back(frame).is_err(), "given back twice");
                assert!(frames.entry(frame).is_free());
            }
            let others = (0..).zip(words.iter().zip(&shared)).filter(|(other, _)| *other != frame);
            others
                .for_each(|(other, (before, after))| assert_eq!(before, after, "frame {other} has changed"));
        }
    }
    has_taken
}

pub(crate) fn examples() -> Vec<Vec<u8>> {
    // Free, free and installed, held, in use.
    let mut words = [0; 4];
    let mut frames = Frames::new(Shared(&mut words), 4);
    frames.install(1);
    let _ = frames.take(2, Take::ForGood);
    frames.allocate_frame(&mut Cursor::at(3));
    vec![vec![0; 32], words.map(u64::to_le_bytes).concat()]
}
