//! Fault-around: what left together often comes back together.
//!
//! Enters: faults that belong to no stream, and pages that went to the store. Leaves: the stored neighbours of the
//! page, contiguous around it, in its aligned group of 1 (none), 2, 4, 8 or 16 pages.
//!
//! How wide the group is follows evidence, not what becomes of the pages brought: a page that was used once leaves no
//! trace, so it would look unused. Instead some groups leave one neighbour out, a **probe**. A probe that is touched
//! was a page worth bringing; one that outlasts the page it was left out beside was not. A probe out of a group that
//! would not have been brought anyway costs nothing, so a guest of random touches is found out, and found changed,
//! without one page brought in vain.
use super::ask;
use crate::replacement::Run;
use alloc::vec::Vec;
use plimsoll_types::PageIndex;

/// The widest group. A batch of 16 costs about 5 us a page (FACTS: 8 cost 7.4, 64 cost 1.4): a third of one round trip.
const WIDTH_MAX: u32 = 16;
/// Probes judged together. Hits show early and misses late, so a verdict waits for all or for certainty.
const COHORT: usize = 16;
/// More than three quarters of the probes touched: twice the width.
const HITS_TO_WIDEN: usize = 12;
/// More than half of the probes not touched: half the width.
const MISSES_TO_NARROW: usize = 9;
/// One group in so many leaves a probe out where that costs a fault.
const PROBE_EVERY: u32 = 4;
/// Faults after which a probe that nobody touched was not worth bringing, if its companion has not left before: at
/// first, and at least however quick the touches of earlier probes were.
const LIFE_MAX: u32 = 4096;
const LIFE_MIN: u32 = 64;
/// So many times as long as the slowest touch of a good cohort, probes of the next wait.
const LIFE_SLACK: u32 = 4;

/// A page left out to see whether it is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Probe {
    page: PageIndex,
    /// The page whose fault would have brought it.
    companion: PageIndex,
    /// The cohort's age then.
    planted: u32,
}

/// The fault-around of one machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Around {
    width: u32,
    probes: [Option<Probe>; COHORT],
    planted: usize,
    hits: usize,
    misses: usize,
    /// Faults since the cohort began.
    age: u32,
    /// The longest a touched probe of the cohort waited, in faults.
    slowest: u32,
    /// How long probes wait, in faults.
    life: u32,
}

impl Around {
    pub(super) fn new() -> Self {
        Self {
            width: 1,
            probes: [None; COHORT],
            planted: 0,
            hits: 0,
            misses: 0,
            age: 0,
            slowest: 0,
            life: LIFE_MAX,
        }
    }

    /// Pages in a group; 1 brings nothing.
    pub(super) fn width(&self) -> u32 {
        self.width
    }

    /// The guest touched a page, whoever it belongs to.
    pub(super) fn touched(&mut self, page: PageIndex) {
        let touched = self.probes.iter().flatten().find(|probe| probe.page == page);
        let Some(waited) = touched.map(|probe| self.age - probe.planted) else { return };
        self.slowest = self.slowest.max(waited);
        self.hits += self.resolve(|probe| probe.page == page);
        self.judge();
    }

    /// A page went to the store.
    pub(super) fn left(&mut self, page: PageIndex) {
        let missed = self.resolve(|probe| probe.companion == page);
        if missed > 0 {
            self.misses += missed;
            self.judge();
        }
    }

    /// The page came without a touch: it says nothing about its group any more, and its place is free again.
    pub(super) fn brought(&mut self, page: PageIndex) {
        self.planted -= self.resolve(|probe| probe.page == page);
    }

    fn resolve(&mut self, is_resolved: impl Fn(&Probe) -> bool) -> usize {
        let resolved = self.probes.iter_mut().filter(|place| place.as_ref().is_some_and(&is_resolved));
        resolved.map(|place| *place = None).count()
    }

    /// Asks for the neighbours of a page that belongs to no stream.
    pub(super) fn faulted(
        &mut self,
        page: PageIndex,
        stored: &impl Fn(PageIndex) -> bool,
        out: &mut Vec<Run>,
    ) {
        self.age += 1;
        let oldest = self.age.saturating_sub(self.life);
        self.misses += self.resolve(|probe| probe.planted < oldest);
        self.judge();
        let group = self.width.max(2);
        let start = page.0 - page.0 % group;
        let end = start.saturating_add(group);
        let is_stored = |near: &u32| stored(PageIndex(*near));
        let from = (start..page.0).rev().find(|near| !is_stored(near)).map_or(start, |near| near + 1);
        let until = (page.0 + 1..end).find(|near| !is_stored(near)).unwrap_or(end);
        let neighbours = || (from..until).filter(|near| *near != page.0).map(PageIndex);
        let count = until - from - 1;
        // Which one is arbitrary but must not be always the nearest: a multiplicative hash of the page.
        let draw = page.0.wrapping_mul(0x9e37_79b9) >> 16;
        let probe =
            if count > 0 && self.is_probe_due() { neighbours().nth((draw % count) as usize) } else { None };
        if let Some(left_out) = probe {
            self.plant(Probe { page: left_out, companion: page, planted: self.age });
        }
        if self.width > 1 {
            neighbours().filter(|near| Some(*near) != probe).for_each(|near| ask(out, near));
        }
    }

    fn is_probe_due(&self) -> bool {
        self.planted < COHORT && (self.width == 1 || self.age.is_multiple_of(PROBE_EVERY))
    }

    fn plant(&mut self, probe: Probe) {
        if let Some(free) = self.probes.iter_mut().find(|place| place.is_none()) {
            *free = Some(probe);
            self.planted += 1;
        }
    }

    fn judge(&mut self) {
        let (width, life) = match () {
            () if self.hits >= HITS_TO_WIDEN => {
                let life = (self.slowest * LIFE_SLACK).clamp(LIFE_MIN, LIFE_MAX);
                ((self.width * 2).min(WIDTH_MAX), life)
            }
            () if self.misses >= MISSES_TO_NARROW => ((self.width / 2).max(1), self.life),
            () if self.hits + self.misses >= COHORT => (self.width, self.life),
            () => return,
        };
        // Where nothing is brought, waiting costs nothing, and slow touches are found again.
        *self = Self { width, life: if width == 1 { LIFE_MAX } else { life }, ..Self::new() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Faults a page of a machine of which the pages `here` are not stored; returns what was asked for.
    fn fault(around: &mut Around, page: u32, here: &[u32]) -> Vec<u32> {
        let mut out = Vec::new();
        around.touched(PageIndex(page));
        around.faulted(PageIndex(page), &|near| near.0 != page && !here.contains(&near.0), &mut out);
        out.iter().flat_map(|run| run.first.0..run.first.0 + run.pages).collect()
    }

    /// A guest that touches all of its objects of 16 pages, or one page of each.
    fn work(around: &mut Around, objects: core::ops::Range<u32>, touched: u32) {
        for object in objects {
            let mut here = Vec::new();
            for page in (object * 16..).take(touched as usize) {
                if !here.contains(&page) {
                    let mut brought = fault(around, page, &here);
                    here.append(&mut brought);
                    here.push(page);
                }
            }
            for page in (object * 16..).take(16) {
                around.left(PageIndex(page));
            }
        }
    }

    #[test]
    fn probes_alone_widen_the_group_and_narrow_it_again() {
        let mut around = Around::new();
        assert!(fault(&mut around, 5, &[]).is_empty(), "nothing is brought before there is evidence");
        work(&mut around, 1..400, 16);
        assert_eq!(around.width(), WIDTH_MAX);
        work(&mut around, 400..1200, 1);
        assert_eq!(around.width(), 1);
        work(&mut around, 1200..1600, 16);
        assert_eq!(around.width(), WIDTH_MAX, "found changed without having brought anything");
    }

    #[test]
    fn a_group_is_aligned_and_ends_at_the_first_page_that_is_not_stored() {
        let mut around = Around { width: 8, ..Around::new() };
        let mut out = Vec::new();
        around.faulted(PageIndex(20), &|near| near.0 != 20 && near.0 != 17, &mut out);
        let runs = [(18, 2), (21, 3)].map(|(first, pages)| Run { first: PageIndex(first), pages });
        assert_eq!(out, runs);
    }

    #[test]
    fn a_probe_that_nobody_touches_expires() {
        let mut around = Around { width: 2, life: LIFE_MIN, ..Around::new() };
        (0..400).for_each(|object| {
            fault(&mut around, object * 16, &[]);
        });
        assert_eq!(around.width(), 1);
    }
}
