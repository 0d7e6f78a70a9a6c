//! How a new manager takes a machine over from one that is gone, wherever that one stopped.
//!
//! Enters: the machine's memory and its page words, both of which outlived the earlier manager. Leaves: a [`Machine`]
//! whose words agree with what is where. The order matters:
//!
//! 1. **Barrier.** The agent adopts the new epoch. Its answer proves that what the earlier manager queued has been
//!    done or refused: nothing moves behind our back from here on.
//!    All guest RAM is registered then, blocks that had been left to the kernel among it.
//! 2. **Look.** Guest RAM and airlock are looked up. From the barrier on guest RAM can only lose pages (a discard),
//!    because nobody installs any; so a page that is seen there belongs to the guest.
//! 3. **Drain.** Events that were waiting are read; whoever waits for a discard to be read goes on now. This comes
//!    after looking: a discard takes effect only after its event was read, so while we look nothing changes under us.
//!    In the other order a second crash between the two could leave a page whose discard nobody remembers and whose
//!    older bytes a word still names. Faults are dropped: step 5 has every waiter fault anew, those whose event the
//!    earlier manager read and did not serve, too.
//! 4. **Reconcile.** [`Machine::recover`] believes what was seen over what the words say, then the drained discards
//!    are applied: they are newer than anything seen.
//! 5. **Wake** ([`Pager::resume`](super::pager::Pager::resume)), when the store has been recovered, too.
//!
//! Discards that the earlier manager had read and not applied are kept with what outlives it, and read again here. A page
//! whose discard had been applied, but that has not gone yet, is not taken for a while. So a discard is lost only if it
//! takes longer than that while to come into effect: then a page can come back with the guest's own old bytes instead of
//! zeros; never with anybody else's.
use super::pager::PagerError;
use super::space::{Space, SpaceError, SpaceEvent};
use plimsoll_core::airlock::Shape;
use plimsoll_core::layout::GuestLayout;
use plimsoll_core::machine::Machine;
use plimsoll_core::map::Words;
use plimsoll_core::replacement::Run;
use plimsoll_types::PageIndex;

/// How often events are read at most at a take-over, where they come few at a time: a journal that is full ends it, too.
const DRAINS_MAX: usize = 64;

/// Steps 1 to 4 for one machine. The objects its words name afterwards are [`Machine::objects`]: the domain's store
/// is to be recovered from those of all its machines.
///
/// # Errors
/// [`PagerError`] when the machine is gone or its words are damaged.
pub fn take_over<S: Space, W: Words>(
    space: &mut S,
    epoch: u64,
    layout: GuestLayout,
    words: W,
    airlock: Shape,
    seed: u64,
) -> Result<Machine<W>, PagerError> {
    space.begin_epoch(epoch)?;
    watch_all(space, &layout)?;
    let presence = space.presence()?;
    let mut events = Vec::new();
    // A guest that faults without end must not keep the host from its manager: what is left over has not taken effect,
    // and the pager reads it before it does anything else.
    for _ in 0..DRAINS_MAX {
        let before = events.len();
        space.read_events(&mut events)?;
        if events.len() == before {
            break;
        }
    }
    let has_page = |page| presence.has_page(page);
    let mut machine = Machine::recover(layout, words, airlock, seed, has_page, |at| presence.has_slot(at))?;
    for event in events {
        if let SpaceEvent::Discard { first, pages } = event {
            // The store is rebuilt from what words name after this: there is nothing to release yet.
            machine.discarded(first.0..first.0.saturating_add(pages), |_| {})?;
        }
    }
    space.applied();
    Ok(machine)
}

/// Registers every block: which of them the earlier manager had left to the kernel shows in no word for certain.
fn watch_all<S: Space>(space: &mut S, layout: &GuestLayout) -> Result<(), PagerError> {
    for run in regions(layout) {
        if let Some(stop) = space.watch(run)?.stop {
            let (first, pages, cause) = (run.first.0, run.pages, format!("{stop:?}"));
            return Err(SpaceError::Call { call: "watch", first, pages, cause }.into());
        }
    }
    Ok(())
}

/// The pages of each region.
pub(super) fn regions(layout: &GuestLayout) -> impl Iterator<Item = Run> {
    let mut next = 0;
    layout.regions().iter().map(move |region| {
        let first = PageIndex(next);
        let pages = u32::try_from(region.bytes.pages_floor().0).unwrap_or(u32::MAX);
        next += pages;
        Run { first, pages }
    })
}
