//! What is left of translations that may be cached, after commands that drop some of them.
//!
//! Enters: all that may be cached, how one thing is made of another, and commands whose order is open. Leaves: what may be there
//! afterwards. It is the part that processors ([`crate::tlb`]) and remapping hardware ([`crate::iotlb`]) have in common: whoever uses
//! a stale thing may make another out of it, at any time.
use crate::address::{Input, Span};

/// Something cached.
pub(crate) trait Item: Copy + PartialEq {
    /// Whether using `self`, and nothing else that is stale, may make `item`.
    fn makes(&self, item: &Self) -> bool;
}

/// What a command does.
pub(crate) trait Drops<T> {
    /// Whether `item` must be gone once it is done.
    fn drops(&self, item: &T) -> bool;
}

/// Everything that may be cached of one change, each thing or nothing.
pub(crate) type Items<T, const N: usize> = [Option<T>; N];

/// Things that are made one from the other, each from the next.
struct Chain<'a, T> {
    item: &'a T,
    before: Option<&'a Chain<'a, T>>,
}

impl<T> Chain<'_, T> {
    fn all(&self, mut holds: impl FnMut(&T) -> bool) -> bool {
        let mut link = Some(self);
        while let Some(Self { item, before }) = link {
            if !holds(item) {
                return false;
            }
            link = *before;
        }
        true
    }
}

/// What may be there of `legal` once all of `effects` are done, in whatever order, where `present` was there before.
pub(crate) fn left<T: Item, E: Drops<T>, I: Iterator<Item = E>, const N: usize>(
    legal: &Items<T, N>,
    present: &Items<T, N>,
    effects: &impl Fn() -> I,
) -> Items<T, N> {
    if effects().next().is_none() {
        return *present;
    }
    let mut left = [None; N];
    for (place, item) in left.iter_mut().zip(legal) {
        *place = item.filter(|item| survives(item, None, legal, present, effects));
    }
    left
}

/// Whether `item` can be there after those of the effects that drop all of `after`: it was there and none drops it, or it is made
/// anew, once those that drop it are done, from something that has survived them.
fn survives<T: Item, E: Drops<T>, I: Iterator<Item = E>>(
    item: &T,
    after: Option<&Chain<'_, T>>,
    legal: &[Option<T>],
    present: &[Option<T>],
    effects: &impl Fn() -> I,
) -> bool {
    let chain = Chain { item, before: after };
    let untouched = !effects().any(|effect| chain.all(|item| effect.drops(item)));
    if untouched && present.contains(&Some(*item)) {
        return true;
    }
    legal.iter().flatten().any(|source| {
        source.makes(item)
            && chain.all(|used| used != source)
            && survives(source, Some(&chain), legal, present, effects)
    })
}

/// The addresses of `span` where commands differ: its first, and where a block of one of the sizes begins or ends to be met by one of
/// the ranges.
pub(crate) fn places(
    span: Span,
    shifts: [u32; 2],
    ranges: impl Iterator<Item = Span>,
) -> impl Iterator<Item = Input> {
    let edges = ranges.flat_map(move |range| {
        let after = range.last().0.saturating_add(1);
        [range.first().0, after].into_iter().flat_map(move |edge| {
            shifts.into_iter().flat_map(move |shift| {
                let down = edge >> shift << shift;
                [down, down.saturating_add(1 << shift)]
            })
        })
    });
    let (first, last) = (span.first().0, span.last().0);
    let inside = edges.filter(move |edge| (first..=last).contains(edge));
    core::iter::once(first).chain(inside).map(Input)
}
