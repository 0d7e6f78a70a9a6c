//! Which part of what a guest is to be without its balloon holds, and which is unplugged from it.
//!
//! Enters: what the guest is to lack of all it could have, and what its virtio-mem devices and its balloon have. Leaves: what the
//! balloon is to hold, and what is to be plugged, if that is to change. It has no clock and does no I/O. What must never happen:
//! memory that is plugged and unplugged in turns, a guest that waits for a module while its balloon holds what it needs, or one that
//! is asked for ever for what it does not give.
//!
//! 1. *The balloon goes first*, both ways: it moves in pages and at once. Only when it is empty and the guest is to have still more,
//!    by a block or more, is more plugged, in whole blocks, and never above what the devices can bring.
//! 2. *What is left alone for long is unplugged.* When the balloon is to hold a good deal ([`margin`]) for
//!    half a minute, so much is unplugged that half of that stays in it: a guest that wants a little back gets it from its balloon.
//!    So between plugging and unplugging lies always half a margin and that time.
//! 3. *A part is a part.* What the guest has plugged is what counts, whatever it was asked. A guest that unplugs nothing more for
//!    [`UNCOOPERATIVE`] is asked for what it has, which is [told](Course::kept), and again after a rest that doubles. The balloon
//!    holds the rest.
use super::{REST_MAX, UNCOOPERATIVE};
use crate::control::{HotMemory, HotMemoryId, HotplugMethod};
use plimsoll_types::ByteCount;
use std::time::Duration;

/// How long a balloon is to hold much before that is unplugged: guests whose load comes and goes each minute keep it.
const SHRINK_AFTER: Duration = Duration::from_secs(30);
/// The first rest after a guest did not unplug what it was asked to.
const REST_MIN: Duration = Duration::from_secs(60);

/// All virtio-mem devices of a machine as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plugged {
    /// The most they can bring.
    pub maximum: ByteCount,
    /// What they were asked to bring.
    pub requested: ByteCount,
    /// What the guest has of that.
    pub plugged: ByteCount,
    /// The largest of their blocks: nothing smaller is asked for.
    pub block: ByteCount,
    /// What the guest was to keep at most and keeps more than, if that was given up.
    pub in_vain: Option<ByteCount>,
}

impl Plugged {
    /// Of those devices whose interface tells everything; none where there is none.
    pub fn of(all: &[HotMemory]) -> Option<Self> {
        let mut sum: Option<Self> = None;
        for memory in devices(all) {
            let (maximum, plugged) = (memory.maximum?, memory.plugged?);
            // A device that claims what cannot be is not driven.
            let is_possible = plugged <= maximum && memory.requested <= maximum && memory.block.0 > 0;
            let before = sum.unwrap_or_default();
            sum = Some(Self {
                maximum: ByteCount(before.maximum.0.checked_add(maximum.0).filter(|_| is_possible)?),
                requested: before.requested + memory.requested,
                plugged: before.plugged + plugged,
                block: before.block.max(memory.block),
                in_vain: None,
            });
        }
        sum.filter(|sum| sum.maximum > ByteCount(0))
    }

    /// What the guest could have of them and has not.
    pub const fn unplugged(&self) -> ByteCount {
        self.maximum.saturating_sub(self.plugged)
    }

    const fn down(&self, size: ByteCount) -> ByteCount {
        ByteCount(size.0 - size.0 % self.block.0)
    }
}

/// Those that bring memory in and out.
fn devices(all: &[HotMemory]) -> impl Iterator<Item = &HotMemory> {
    all.iter().filter(|memory| memory.method == HotplugMethod::VirtioMem)
}

/// Shares what all devices are to bring among them: beginning with what the guest has of each, so that more is asked of the first
/// ones, and less of the last ones, and nowhere both. Only those whose request changes.
pub fn requests(all: &[HotMemory], total: ByteCount) -> Vec<(HotMemoryId, ByteCount)> {
    let down = |memory: &HotMemory, size: u64| size - size % memory.block.0.max(1);
    let mut sizes: Vec<(&HotMemory, u64)> = devices(all)
        .map(|memory| (memory, down(memory, memory.plugged.unwrap_or(memory.requested).0)))
        .collect();
    let sum: u64 = sizes.iter().map(|(_, size)| size).sum();
    let (mut more, mut less) = (total.0.saturating_sub(sum), sum.saturating_sub(total.0));
    for (memory, size) in &mut sizes {
        let room = memory.maximum.unwrap_or_default().0.saturating_sub(*size);
        let added = down(memory, more.min(room));
        (*size, more) = (*size + added, more - added);
    }
    for (memory, size) in sizes.iter_mut().rev() {
        // Rounded up: what is to go goes.
        let gone = less.next_multiple_of(memory.block.0.max(1)).min(*size);
        (*size, less) = (*size - gone, less.saturating_sub(gone));
    }
    let changed = sizes.into_iter().filter(|(memory, size)| *size != memory.requested.0);
    changed.map(|(memory, size)| (memory.id.clone(), ByteCount(size))).collect()
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Course {
    /// What the balloon is to hold.
    pub balloon: ByteCount,
    /// What the devices are to bring from now on, if that changes.
    pub request: Option<ByteCount>,
    /// The guest has not unplugged what it was asked to: it was to keep no more than this. Told once, when it is given up.
    pub kept: Option<ByteCount>,
}

/// Decides it, look by look.
#[derive(Clone, Debug)]
pub struct Plugging {
    /// Since when the balloon is to hold much.
    much_since: Option<Duration>,
    /// What was plugged when it last became less, and when that was, while less is asked for.
    shrinking: Option<(ByteCount, Duration)>,
    rest: Duration,
    rests_until: Duration,
}

impl Default for Plugging {
    fn default() -> Self {
        Self { much_since: None, shrinking: None, rest: REST_MIN, rests_until: Duration::ZERO }
    }
}

impl Plugging {
    /// The guest is to lack so much of all it could have. `balloon` is what its balloon holds, of a memory of that size beside the
    /// devices.
    pub fn step(
        &mut self,
        now: Duration,
        lack: ByteCount,
        balloon: ByteCount,
        memory: ByteCount,
        seen: &Plugged,
    ) -> Course {
        let margin = margin(memory + seen.plugged, seen.block);
        let surplus = lack.saturating_sub(seen.unplugged());
        let wanting = seen.unplugged().saturating_sub(lack);
        let course = Course { balloon: surplus, request: None, kept: None };
        if surplus < margin || seen.plugged == ByteCount(0) {
            self.much_since = None;
        }
        if wanting >= seen.block {
            return Course { request: self.grow(wanting, balloon, margin, seen), ..course };
        }
        if seen.requested < seen.plugged {
            return self.shrink(now, lack, seen, course);
        }
        self.shrinking = None;
        let since = *self.much_since.get_or_insert(now);
        let is_due = now.saturating_sub(since) >= SHRINK_AFTER && now >= self.rests_until;
        let goes = seen.down(surplus.saturating_sub(ByteCount(margin.0 / 2)).min(seen.plugged));
        if surplus < margin || seen.plugged == ByteCount(0) || !is_due || goes == ByteCount(0) {
            return course;
        }
        self.shrinking = Some((seen.plugged, now));
        Course { request: Some(seen.down(seen.plugged.saturating_sub(goes))), ..course }
    }

    /// The guest is to have more than an empty balloon leaves it.
    fn grow(
        &mut self,
        wanting: ByteCount,
        balloon: ByteCount,
        margin: ByteCount,
        seen: &Plugged,
    ) -> Option<ByteCount> {
        (self.shrinking, self.much_since) = (None, None);
        // What is being unplugged is called back at once; for more the balloon has to be empty, but for a remainder.
        let held = if balloon.0 > margin.0 / 4 { ByteCount(0) } else { wanting };
        let request =
            seen.down(seen.plugged + held).min(seen.down(seen.maximum)).max(seen.down(seen.plugged));
        let is_more = request > seen.requested;
        is_more.then_some(request)
    }

    /// Less was asked for than the guest has.
    fn shrink(&mut self, now: Duration, lack: ByteCount, seen: &Plugged, course: Course) -> Course {
        // Of what was to go so much is to stay now.
        let stays = seen.maximum.saturating_sub(lack);
        if stays >= seen.requested + seen.block {
            self.shrinking = None;
            return Course { request: Some(seen.down(stays).min(seen.down(seen.plugged))), ..course };
        }
        let (plugged, moved) = *self.shrinking.get_or_insert((seen.plugged, now));
        if seen.plugged < plugged {
            self.shrinking = Some((seen.plugged, now));
        } else if now.saturating_sub(moved) >= UNCOOPERATIVE {
            self.shrinking = None;
            self.rests_until = now + self.rest;
            self.rest = (self.rest * 2).min(REST_MAX);
            let kept = Some(seen.requested);
            return Course { request: Some(seen.down(seen.plugged)), kept, ..course };
        }
        course
    }
}

/// How much a balloon holds that is worth unplugging: an eighth of what the guest has, and two blocks.
fn margin(memory: ByteCount, block: ByteCount) -> ByteCount {
    ByteCount(memory.0 / 8).max(block + block)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: fn(u64) -> ByteCount = ByteCount::mib;
    const BLOCK: ByteCount = ByteCount::mib(4);

    /// A guest of 256 MiB with a device of 512, which unplugs down to what it `keeps`, so much a second.
    struct Guest {
        plugging: Plugging,
        seen: Plugged,
        balloon: ByteCount,
        keeps: ByteCount,
        now: u64,
        requests: Vec<(u64, ByteCount)>,
        kept: Vec<ByteCount>,
    }

    impl Guest {
        fn new(plugged: u64) -> Self {
            let (maximum, plugged) = (MIB(512), MIB(plugged));
            let seen = Plugged { maximum, requested: plugged, plugged, block: BLOCK, in_vain: None };
            let (plugging, balloon, keeps) = (Plugging::default(), MIB(0), MIB(0));
            Self { plugging, seen, balloon, keeps, now: 0, requests: Vec::new(), kept: Vec::new() }
        }

        /// It is to lack so much for so many seconds; its balloon follows at once.
        fn lacks(&mut self, lack: u64, seconds: u64) {
            for _ in 0..seconds {
                self.now += 1;
                let now = Duration::from_secs(self.now);
                let course = self.plugging.step(now, MIB(lack), self.balloon, MIB(256), &self.seen);
                self.balloon = course.balloon;
                self.kept.extend(course.kept);
                if let Some(request) = course.request {
                    assert!(request <= self.seen.maximum && request.is_multiple_of(4 << 20), "{request}");
                    self.requests.push((self.now, request));
                    self.seen.requested = request;
                }
                let Plugged { requested, plugged, .. } = self.seen;
                let step = MIB(64);
                self.seen.plugged = if requested > plugged {
                    requested.min(plugged + step)
                } else {
                    plugged.saturating_sub(step).max(requested).max(self.keeps.min(plugged))
                };
            }
        }
    }

    #[test]
    fn the_balloon_is_emptied_before_anything_is_plugged_and_then_only_what_is_wanted() {
        let mut guest = Guest::new(0);
        guest.lacks(512 + 100, 5);
        assert_eq!(
            (guest.balloon, guest.requests.len()),
            (MIB(100), 0),
            "what is unplugged is lacking already"
        );
        guest.lacks(512 + 40, 5);
        assert_eq!((guest.balloon, guest.requests.len()), (MIB(40), 0));
        guest.lacks(512 - 101, 1);
        assert_eq!(
            (guest.balloon, guest.requests.len()),
            (MIB(0), 0),
            "it was not empty when it was looked at"
        );
        guest.lacks(512 - 101, 5);
        assert_eq!(guest.requests, [(12, MIB(100))], "whole blocks of what is wanted, once");
        guest.lacks(0, 20);
        assert_eq!((guest.seen.plugged, guest.balloon), (MIB(512), MIB(0)), "and never more than there is");
    }

    #[test]
    fn what_the_balloon_holds_for_long_is_unplugged_but_for_half_a_margin() {
        let mut guest = Guest::new(512);
        guest.lacks(300, 29);
        assert_eq!(
            (guest.balloon, guest.requests.len()),
            (MIB(300), 0),
            "at first the balloon has all of it"
        );
        guest.lacks(300, 30);
        // An eighth of 768 MiB are 96; half of that stays, rounded to blocks.
        assert_eq!(guest.requests, [(31, MIB(512 - 252))]);
        assert_eq!((guest.seen.plugged, guest.balloon), (MIB(260), MIB(48)), "it lacks 300 as before");
        guest.lacks(300, 300);
        assert_eq!(guest.requests.len(), 1, "and that is that");
    }

    #[test]
    fn a_load_that_comes_and_goes_plugs_nothing_in_and_out() {
        let mut guest = Guest::new(256);
        for _ in 0..50 {
            guest.lacks(256 + 200, 20);
            guest.lacks(256 + 10, 20);
        }
        assert_eq!(guest.requests, []);
        // One whose swings are longer than that and smaller than half a margin is served by its balloon alone, once it is settled.
        guest.lacks(256 + 200, 100);
        let settled = guest.requests.len();
        assert_eq!(settled, 1);
        for _ in 0..20 {
            guest.lacks(256 + 180, 100);
            guest.lacks(256 + 200, 100);
        }
        assert_eq!(guest.requests.len(), settled, "{:?}", guest.requests);
    }

    #[test]
    fn a_guest_that_unplugs_a_part_is_taken_at_what_it_has_and_asked_less_and_less_often() {
        let mut guest = Guest::new(512);
        guest.keeps = MIB(400);
        guest.lacks(300, 60);
        assert_eq!(guest.kept, [MIB(260)]);
        assert_eq!(
            (guest.seen.plugged, guest.seen.requested),
            (MIB(400), MIB(400)),
            "it is not asked for ever"
        );
        assert_eq!(guest.balloon, MIB(300 - 112), "the balloon has what it did not unplug");
        guest.lacks(300, 3600);
        assert!((5..12).contains(&guest.kept.len()), "{} times in an hour", guest.kept.len());
    }

    #[test]
    fn what_is_being_unplugged_is_called_back_when_it_is_wanted_again() {
        let mut guest = Guest::new(512);
        guest.keeps = MIB(480);
        guest.lacks(300, 35);
        assert_eq!((guest.seen.requested, guest.seen.plugged), (MIB(260), MIB(480)));
        guest.lacks(100, 1);
        assert_eq!(guest.seen.requested, MIB(412), "only so much is to go now");
        guest.lacks(0, 3);
        assert_eq!((guest.seen.requested, guest.seen.plugged), (MIB(512), MIB(512)));
    }

    #[test]
    fn any_course_is_within_what_there_is_whatever_is_claimed() {
        let mut random = 1_u64;
        let mut below = |limit: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % limit
        };
        let mut plugging = Plugging::default();
        for second in 0..20_000 {
            let block = MIB(1 << below(8));
            let maximum = ByteCount(block.0 * below(64));
            let mut part = || ByteCount(below(maximum.0 / 4096 + 1) * 4096);
            let seen = Plugged { maximum, requested: part(), plugged: part(), block, in_vain: None };
            let (lack, balloon) = (ByteCount(below(1 << 40)), ByteCount(below(1 << 34)));
            let course = plugging.step(Duration::from_secs(second), lack, balloon, MIB(below(9000)), &seen);
            assert!(
                course.balloon + seen.unplugged() >= lack.min(seen.unplugged()) && course.balloon <= lack
            );
            let is_possible = |request: ByteCount| request <= maximum && request.is_multiple_of(1 << 20);
            assert!(course.request.is_none_or(is_possible), "{course:?} {seen:?}");
        }
    }

    #[test]
    fn devices_are_filled_one_after_the_other_and_those_that_lie_are_left_alone() {
        let device = |id: &str, maximum, requested, plugged| HotMemory {
            id: HotMemoryId(id.to_owned()),
            method: HotplugMethod::VirtioMem,
            block: BLOCK,
            maximum: Some(MIB(maximum)),
            requested: MIB(requested),
            plugged: Some(MIB(plugged)),
        };
        let all = [device("a", 128, 64, 64), device("b", 128, 0, 0)];
        let (maximum, plugged) = (MIB(256), MIB(64));
        let sum = Plugged { maximum, requested: plugged, plugged, block: BLOCK, in_vain: None };
        assert_eq!(Plugged::of(&all), Some(sum));
        let named = |id: &str, size| (HotMemoryId(id.to_owned()), MIB(size));
        assert_eq!(requests(&all, MIB(200)), [named("a", 128), named("b", 72)]);
        assert_eq!(requests(&all, MIB(64)), []);
        assert_eq!(requests(&all, MIB(6)), [named("a", 4)]);
        let both = [device("a", 128, 64, 64), device("b", 128, 64, 64)];
        assert_eq!(requests(&both, MIB(100)), [named("b", 36)], "no guest grows because it is to shrink");
        assert_eq!(requests(&both, MIB(132)), [named("a", 68)], "nor shrinks because it is to grow");
        // One that does not unplug is asked for what it has, and the other one for nothing more.
        let stuck = [device("a", 128, 64, 64), device("b", 128, 36, 64)];
        assert_eq!(requests(&stuck, MIB(128)), [named("b", 64)]);
        let modules = HotMemory { method: HotplugMethod::Acpi, ..device("modules", 512, 0, 0) };
        for none in [vec![], vec![modules], vec![device("a", 8, 0, 16)], vec![device("a", 0, 0, 0)]] {
            assert_eq!(Plugged::of(&none), None, "{none:?}");
        }
    }
}
