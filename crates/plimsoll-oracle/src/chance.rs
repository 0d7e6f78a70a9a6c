//! Numbers at random, the same for the same seed.

/// A generator (SplitMix64).
#[derive(Clone, Debug)]
pub struct Chance {
    state: u64,
}

impl Chance {
    /// A generator whose numbers are this seed's.
    pub const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// Any 64 bits.
    pub const fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ self.state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `limit`; zero if that is zero.
    pub const fn below(&mut self, limit: u64) -> u64 {
        let bits = self.bits();
        match bits.checked_rem(limit) {
            Some(number) => number,
            None => 0,
        }
    }

    /// True in `percent` of a hundred.
    pub const fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// What `attempt` makes, once it makes something.
    pub(crate) fn until<T>(&mut self, mut attempt: impl FnMut(&mut Self) -> Option<T>) -> T {
        loop {
            if let Some(made) = attempt(self) {
                return made;
            }
        }
    }

    /// One of them.
    ///
    /// # Panics
    /// There is none.
    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        let number = usize::try_from(self.below(all.len() as u64)).unwrap_or(0);
        *all.get(number).expect("there is something to choose from")
    }
}
