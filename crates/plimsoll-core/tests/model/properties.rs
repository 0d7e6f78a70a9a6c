//! What must hold in every state, and what must happen in some.
//!
//! Enters: a state. Leaves: whether it is a state the protocol may be in. The `sometimes` properties prove that the
//! exploration reached what it is about; each test lists those that its configuration can reach.
use crate::world::{At, DiedAt, Discard, Host, Keeper, Manager, Outcome, Pager, Value, World};
use plimsoll_core::word::{PageState, StateKind};
use plimsoll_types::{PageCount, PageIndex};
use stateright::Property;

/// Everything that must hold and everything that should be seen.
pub(crate) fn all() -> Vec<Property<Pager>> {
    let mut all = vec![
        Property::always("every page reads as its guest last left it", reads_right),
        Property::always("no machine reads another's bytes", reads_no_other),
        Property::always("the core answers as documented", |_, world: &World| world.broken.is_none()),
        Property::always("every page is counted once", counts_right),
        Property::always("a word names its own slot page, and bytes are in it", names_memory),
        Property::always("an object has a reference for every word that names it", has_references),
        Property::always("nothing is kept that no word names", keeps_nothing_else),
        Property::always("airlock memory is in limbo or about to be given back", knows_its_memory),
        Property::always("an empty airlock can be filled again", reuses_slots),
        Property::always("what is in guest RAM a word says is there", knows_guest_memory),
    ];
    all.extend(seen());
    all
}

fn each_page(pager: &Pager, world: &World, mut holds: impl FnMut(usize, &Host, u32) -> bool) -> bool {
    let mut hosts = world.hosts.iter().enumerate();
    hosts.all(|(machine, host)| (0..pager.pages).all(|page| holds(machine, host, page)))
}

fn touched(world: &World, host: &Host, page: u32) -> Option<Value> {
    host.touch(page, |value| world.is_kept(value))
}

fn reads_right(pager: &Pager, world: &World) -> bool {
    each_page(pager, world, |_, host, page| {
        touched(world, host, page).is_some_and(|value| host.pages[page as usize].lawful.has(value))
    })
}

fn reads_no_other(pager: &Pager, world: &World) -> bool {
    each_page(pager, world, |machine, host, page| match touched(world, host, page) {
        Some(Value::Own(owner)) => usize::from(owner) == machine,
        _ => true,
    })
}

fn counts_right(pager: &Pager, world: &World) -> bool {
    world.hosts.iter().all(|host| {
        host.machine().is_none_or(|machine| {
            machine.audit().is_ok() && machine.census().total() == PageCount(u64::from(pager.pages))
        })
    })
}

fn names_memory(pager: &Pager, world: &World) -> bool {
    world.hosts.iter().all(|host| {
        let mut named = 0u8;
        (0..pager.pages).all(|page| match host.state(page) {
            Some(PageState::Limbo(at) | PageState::Capturing(at)) => {
                let is_first = named & 1 << at.0 == 0;
                named |= 1 << at.0;
                let holds = host.slots.get(at.get()).copied().flatten().is_some();
                is_first && (holds || matches!(host.state(page), Some(PageState::Capturing(_))))
            }
            Some(_) => true,
            None => false,
        })
    })
}

fn has_references(pager: &Pager, world: &World) -> bool {
    world.references.iter().zip(world.named(pager.pages)).all(|(counted, named)| *counted >= named)
}

fn keeps_nothing_else(pager: &Pager, world: &World) -> bool {
    let is_quiet = world.hosts.iter().all(|host| host.at == At::Idle);
    !is_quiet || world.references == world.named(pager.pages)
}

fn knows_its_memory(_: &Pager, world: &World) -> bool {
    world.hosts.iter().all(|host| match &host.manager {
        Manager::Up(machine) if host.at == At::Idle && host.moves.is_empty() => {
            let airlock = machine.airlock();
            let holds = host.slots.iter().flatten().count() as u64;
            PageCount(holds) == airlock.limbo() + airlock.residue()
        }
        _ => true,
    })
}

/// Else it would never be taken, and count for nobody.
fn knows_guest_memory(pager: &Pager, world: &World) -> bool {
    each_page(pager, world, |_, host, number| {
        let page = &host.pages[number as usize];
        let is_served = host.at == At::Idle && host.keeper == Keeper::Manager;
        let is_settled = is_served && host.moves.is_empty() && page.discard == Discard::Idle;
        let is_known = |state: PageState| state.is_in_ram() || state == PageState::Unwatched;
        !is_settled || page.ram.is_none() || host.state(number).is_some_and(is_known)
    })
}

fn reuses_slots(pager: &Pager, world: &World) -> bool {
    world.hosts.iter().all(|host| match &host.manager {
        Manager::Up(machine) if host.at == At::Idle && host.moves.is_empty() => {
            let mut airlock = machine.airlock().clone();
            if airlock.limbo() + airlock.residue() != PageCount(0) {
                return true;
            }
            airlock.close();
            (0..pager.shape.slots).all(|_| airlock.reserve(pager.shape.slot_pages).is_some())
        }
        _ => true,
    })
}

fn any_page(pager: &Pager, world: &World, mut is: impl FnMut(&Host, u32) -> bool) -> bool {
    !each_page(pager, world, |_, host, page| !is(host, page))
}

fn any_host(world: &World, is: impl Fn(&Host) -> bool) -> bool {
    world.hosts.iter().any(|host| is(host))
}

fn died(world: &World, at: DiedAt) -> bool {
    any_host(world, |host| host.at == At::Dead(at))
}

/// What a configuration can be asked to have reached.
fn seen() -> Vec<Property<Pager>> {
    let mut seen = vec![
        Property::sometimes("a page is stored", |pager, world: &World| {
            any_page(pager, world, |host, page| matches!(host.state(page), Some(PageState::Stored(_))))
        }),
        Property::sometimes("a page comes back from limbo", |_, world: &World| {
            any_host(world, |host| match host.at {
                At::Copied { page } => matches!(host.state(page), Some(PageState::Limbo(_))),
                _ => false,
            })
        }),
        Property::sometimes("a page comes back from the store", |_, world: &World| {
            any_host(world, |host| match host.at {
                At::Copied { page } => matches!(host.state(page), Some(PageState::Stored(_))),
                _ => false,
            })
        }),
        Property::sometimes("a page is discarded under its capture", |pager, world: &World| {
            any_page(pager, world, |host, page| {
                host.is_moving(page) && matches!(host.state(page), Some(PageState::Absent))
            })
        }),
        Property::sometimes("a move brings a page that was discarded", |pager, world: &World| {
            any_page(pager, world, |host, page| {
                let moved = |at: &crate::world::Move| at.page == page && at.outcome == Some(Outcome::Moved);
                host.moves.iter().any(moved) && host.state(page) == Some(PageState::Absent)
            })
        }),
        Property::sometimes("a move finds the page gone", |_, world: &World| {
            any_host(world, |host| host.moves.iter().any(|asked| asked.outcome == Some(Outcome::Missing)))
        }),
        Property::sometimes("a discard returns before any word knows", |pager, world: &World| {
            any_page(pager, world, |host, page| {
                host.at == At::ReadDiscard { page } && host.pages[page as usize].discard == Discard::Idle
            })
        }),
        Property::sometimes("COPY finds a discard queued", |_, world: &World| {
            any_host(world, |host| {
                let queued = host.pages.iter().any(|page| page.discard == Discard::Queued);
                matches!(host.at, At::Copy { .. }) && queued
            })
        }),
        Property::sometimes("a resident word has nothing in RAM", |pager, world: &World| {
            any_page(pager, world, |host, page| {
                host.state(page) == Some(PageState::Resident) && host.pages[page as usize].ram.is_none()
            })
        }),
        Property::sometimes("a zero page leaves limbo for nowhere", |pager, world: &World| {
            any_page(pager, world, |host, page| {
                host.state(page) == Some(PageState::Zero)
                    && host.machine().is_some_and(|machine| machine.airlock().residue() > PageCount(0))
            })
        }),
        Property::sometimes("both airlock slots are in use", |_, world: &World| {
            any_host(world, |host| host.slots.iter().flatten().count() == 2)
        }),
        Property::sometimes("a discarded page may come back after a crash", |pager, world: &World| {
            any_page(pager, world, |host, page| {
                let page = host.pages[page as usize];
                page.discard == Discard::Idle && page.ram.is_some() && !page.lawful.is_one()
            })
        }),
        Property::sometimes("a new manager serves", |_, world: &World| {
            world.crashes_left == 0 && any_host(world, |host| matches!(host.at, At::Copied { .. }))
        }),
        Property::sometimes("a page is pinned", |_, world: &World| {
            any_host(world, |host| {
                host.machine().is_some_and(|machine| machine.census().of(StateKind::Pinned) > PageCount(0))
            })
        }),
        Property::sometimes("both pages of a run are being moved", |_, world: &World| {
            any_host(world, |host| host.moves.len() == 2)
        }),
        Property::sometimes("two machines share an object", |_, world: &World| {
            let names = |host: &Host| {
                host.machine().is_some_and(|machine| {
                    let common = Value::Common.object();
                    machine.objects().any(|(page, object): (PageIndex, _)| page.0 < 3 && object == common)
                })
            };
            world.hosts.len() == 2 && world.hosts.iter().all(|host| names(host))
        }),
    ];
    seen.extend(blocks());
    seen.extend(deaths());
    seen
}

/// What becomes of blocks.
fn blocks() -> [Property<Pager>; 6] {
    [
        Property::sometimes("the kernel serves a page", |pager, world: &World| {
            any_page(pager, world, |host, page| {
                host.keeper == Keeper::Kernel && host.pages[page as usize].ram.is_some()
            })
        }),
        Property::sometimes("a discard that nobody hears of is under way", |_, world: &World| {
            any_host(world, Host::has_silent_discard)
        }),
        Property::sometimes("a discard is read of a block left to the kernel", |_, world: &World| {
            any_host(world, |host| host.keeper == Keeper::Kernel && matches!(host.at, At::ReadDiscard { .. }))
        }),
        Property::sometimes("a page is stored that the kernel had brought", |pager, world: &World| {
            world.unwatches_left == Some(0)
                && any_page(pager, world, |host, page| matches!(host.state(page), Some(PageState::Stored(_))))
        }),
        Property::sometimes("a block comes back whole", |pager, world: &World| {
            any_host(world, |host| matches!(host.at, At::MovedIn { done, .. } if done == pager.pages))
        }),
        Property::sometimes("a block comes back half", |pager, world: &World| {
            any_host(
                world,
                |host| matches!(host.at, At::MovedIn { done, .. } if (1..pager.pages).contains(&done)),
            )
        }),
    ]
}

/// A crash in every sub-step.
fn deaths() -> [Property<Pager>; 13] {
    [
        Property::sometimes("it dies idle", |_, world: &World| died(world, DiedAt::Idle)),
        Property::sometimes("it dies before COPY", |_, world: &World| died(world, DiedAt::Copy)),
        Property::sometimes("it dies after COPY", |_, world: &World| died(world, DiedAt::Copied)),
        Property::sometimes("it dies before a release", |_, world: &World| died(world, DiedAt::Release)),
        Property::sometimes("it dies with intent written", |_, world: &World| died(world, DiedAt::Send)),
        Property::sometimes("it dies during a move", |_, world: &World| died(world, DiedAt::Moving)),
        Property::sometimes("it dies with bytes put", |_, world: &World| died(world, DiedAt::Put)),
        Property::sometimes("it dies after a zap", |_, world: &World| died(world, DiedAt::Zapped)),
        Property::sometimes("it dies with a discard read", |_, world: &World| {
            died(world, DiedAt::ReadDiscard)
        }),
        Property::sometimes("it dies with a block left to the kernel", |_, world: &World| {
            died(world, DiedAt::Unwatched)
        }),
        Property::sometimes("it dies with a block registered", |_, world: &World| {
            died(world, DiedAt::Watching)
        }),
        Property::sometimes("it dies with a block moved back", |_, world: &World| {
            died(world, DiedAt::MoveIn)
        }),
        Property::sometimes("it dies while taking over", |_, world: &World| died(world, DiedAt::Recovering)),
    ]
}
