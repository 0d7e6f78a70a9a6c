//! Limits: what is above one goes, no more than that goes for it, and who of a group gives it.
use crate::invariants::{Bid, by_hand, config, first, machines_in, moment, pages, small, tree};
use crate::world::{MIB, World, limited, machine, steps, target, view, why};
use plimsoll_policy::host_state::HostState;
use plimsoll_policy::settings::{GroupSettings, Hold, MachineSettings, Settings};
use plimsoll_policy::tree::Tree;
use plimsoll_policy::view::{HostView, MachineView};
use plimsoll_policy::{Plan, PolicyState, Ppm, Rung, Rungs, Step, decide};
use plimsoll_types::{ByteCount, GroupId, MachineId};
use proptest::prelude::{prop, prop_assert, prop_assert_eq, proptest};
use std::collections::BTreeMap;

/// What is taken from a machine.
fn frees(plan: &Plan, id: u32) -> ByteCount {
    let of = |step| if let Step::Take { frees, .. } = step { frees } else { ByteCount(0) };
    steps(plan, id).into_iter().map(of).sum()
}

/// Groups of those limits, each in the one before it, and the machines of the innermost.
fn nested(limits: &[u64], machines: impl IntoIterator<Item = MachineSettings>) -> Settings {
    let group = |(limit, id): (&u64, u32)| GroupSettings {
        parent: (id > 1).then(|| GroupId(id - 1)),
        limit: Some(MIB(*limit)),
        ..GroupSettings::new(GroupId(id))
    };
    let groups: Vec<GroupSettings> = limits.iter().zip(1..).map(group).collect();
    let parent = groups.last().map(|group| group.id);
    let machines = machines.into_iter().map(|machine| MachineSettings { parent, ..machine }).collect();
    Settings { groups, machines, ..Settings::new(MIB(1 << 20)) }
}

/// A host that has plenty.
fn plenty(machines: Vec<MachineView>) -> HostView {
    HostView::of(0, MIB(64 << 10), MIB(32 << 10), machines)
}

fn decided(settings: Settings, view: &HostView) -> Plan {
    decide(view, &mut PolicyState::new(Tree::new(settings).unwrap()))
}

#[test]
fn machines_give_together_what_their_group_has_above_its_limit() {
    // The first is due 1000 and has 100: the others are to come down to 1000 each, in time.
    let shown = vec![view(1, 100, 1000), view(2, 2000, 100), view(3, 2000, 100)];
    let members = || [1, 2, 3].map(|id| machine(id, 8192, 0, 1000));
    let plan = decided(nested(&[3000], members()), &plenty(shown.clone()));
    assert_eq!([1, 2, 3].map(|id| frees(&plan, id)), [MIB(0), MIB(550), MIB(550)]);
    // Who has a limit of its own gives what is above that, which counts for the group's.
    let members = [machine(1, 8192, 0, 1000), limited(2, 8192, 1200), machine(3, 8192, 0, 1000)];
    let plan = decided(nested(&[3000], members), &plenty(shown));
    assert_eq!([1, 2, 3].map(|id| frees(&plan, id)), [MIB(0), MIB(800), MIB(300)]);
}

#[test]
fn a_group_in_a_group_gives_no_more_than_the_larger_overshoot_needs() {
    let members = || [1, 2, 3].map(|id| machine(id, 8192, 0, 1000));
    let shown = || vec![view(1, 100, 1000), view(2, 2000, 100), view(3, 2000, 100)];
    for limits in [[3000, 3200], [3200, 3000], [3000, 4100]] {
        let plan = decided(nested(&limits, members()), &plenty(shown()));
        assert_eq!([1, 2, 3].map(|id| frees(&plan, id)), [MIB(0), MIB(550), MIB(550)], "{limits:?}");
    }
}

#[test]
fn what_one_machine_cannot_give_others_give_and_what_nobody_can_is_said() {
    let never = |id| MachineSettings { highest: Rung::NEVER_PAGE, ..machine(id, 8192, 0, 1000) };
    let shown = || vec![view(1, 100, 1000), view(2, 2000, 100), view(3, 2000, 100)];
    let cannot = |plan: &Plan, id| why(plan, id).join("\n").contains("cannot be taken");
    // The second has what would go, were it not that it must not be paged. Of the third compressing frees 860.
    let settings = |limit| nested(&[limit], [machine(1, 8192, 0, 1000), never(2), machine(3, 8192, 0, 1000)]);
    let plan = decided(settings(3300), &plenty(shown()));
    assert_eq!([1, 2, 3].map(|id| frees(&plan, id)), [MIB(0), MIB(0), MIB(800)]);
    assert!(![1, 2, 3].into_iter().any(|id| cannot(&plan, id)));
    let plan = decided(settings(3000), &plenty(shown()));
    assert_eq!([1, 2, 3].map(|id| frees(&plan, id).0 >> 20), [0, 0, 860]);
    assert!(cannot(&plan, 2));
    // Nor does it matter that it is in a group of its own.
    let mut settings = settings(3300);
    settings.groups.push(GroupSettings { parent: Some(GroupId(1)), ..GroupSettings::new(GroupId(2)) });
    settings.machines[1].parent = Some(GroupId(2));
    let plan = decided(settings, &plenty(shown()));
    assert_eq!([1, 2, 3].map(|id| frees(&plan, id)), [MIB(0), MIB(0), MIB(800)]);
    assert!(![1, 2, 3].into_iter().any(|id| cannot(&plan, id)));
}

/// A group of that limit whose machines have 500 MiB each, then `then`, and then `now`: what is decided in the end.
fn after(limit: u64, members: Vec<MachineSettings>, then: Vec<MachineView>, now: Vec<MachineView>) -> Plan {
    let begun = members.iter().map(|member| view(member.id.0, 500, 500)).collect();
    let mut state = PolicyState::new(Tree::new(nested(&[limit], members)).unwrap());
    let plans = [begun, then, now].into_iter().zip(0..).map(|(machines, second)| {
        decide(&HostView { now_ms: second * 1000, ..plenty(machines) }, &mut state)
    });
    plans.last().unwrap()
}

/// The first machine's target has just risen and would be held for a minute; then it works in less, and the second in more.
#[test]
fn a_target_that_is_held_keeps_no_group_above_its_limit() {
    let members = || vec![machine(1, 4096, 0, 1000), machine(2, 4096, 0, 1000)];
    let risen = || vec![view(1, 1000, 1000), view(2, 500, 500)];
    let plan = after(1500, members(), risen(), vec![view(1, 1000, 500), view(2, 1000, 1000)]);
    // Idle memory taxed, 600 are due to the one and 900 to the other.
    assert_eq!(frees(&plan, 1) + frees(&plan, 2), MIB(500));
    let (gives, comes_to) = (frees(&plan, 1), target(&plan, 1));
    assert!(
        gives.0.abs_diff(MIB(400).0) <= 4096 && comes_to.0.abs_diff(MIB(600).0) <= 4096,
        "{gives} to {comes_to}"
    );
    // As far as is needed, and no further: 600 are due to the first.
    let idle = MachineView { reported_free: MIB(400), rungs: Rungs::ALL, ..view(1, 1000, 500) };
    let plan = after(1500, members(), risen(), vec![idle.clone(), view(2, 700, 700)]);
    assert_eq!((frees(&plan, 1), frees(&plan, 2)), (MIB(200), MIB(0)));
    assert_eq!(target(&plan, 1), MIB(800));
    // And not at all where the group is within its limit.
    let plan = after(1500, members(), risen(), vec![idle, view(2, 500, 500)]);
    assert_eq!((frees(&plan, 1), target(&plan, 1)), (MIB(0), MIB(1000)));
}

/// Two targets are held, one of a machine of which nothing can be taken.
#[test]
fn a_target_gives_way_for_a_limit_only_where_that_brings_something() {
    let never = MachineSettings { highest: Rung::NEVER_PAGE, ..machine(1, 4096, 0, 1000) };
    let members = vec![never, machine(2, 4096, 0, 1000), machine(3, 4096, 0, 1000)];
    let risen = vec![view(1, 1000, 1000), view(2, 1000, 1000), view(3, 500, 500)];
    let idle = |id, free| MachineView { reported_free: MIB(free), ..view(id, 1000, 500) };
    let idle = [idle(1, 300), MachineView { rungs: Rungs::ALL, ..idle(2, 400) }];
    let plan = after(2500, members, risen, idle.into_iter().chain([view(3, 800, 800)]).collect());
    assert_eq!([1, 2, 3].map(|id| frees(&plan, id)), [MIB(0), MIB(300), MIB(0)]);
    assert_eq!([1, 2].map(|id| target(&plan, id)), [MIB(1000), MIB(700)]);
}

proptest! {
    #![proptest_config(config(300))]

    /// Whatever damping holds, where there are means: but for what is a sliver of a machine's.
    #[test]
    fn a_group_that_is_above_its_limit_comes_down_to_it_at_once(
        limits in prop::collection::vec(300..1500u64, 1..4),
        members in prop::collection::vec((0..4usize, 0..50u64, 1..5000u32), 2..7),
        moments in prop::collection::vec(
            (500..25_000u64, prop::collection::vec((0..600u64, 0..600u64, 0..600u64), 6)), 2..8,
        ),
    ) {
        let mut settings = nested(&limits, []);
        for ((group, reservation, shares), id) in members.into_iter().zip(1..) {
            let parent = settings.groups.get(group).map(|group| group.id);
            let member = machine(id, 600, reservation, shares);
            settings.machines.push(MachineSettings { parent, highest: Rung::Disk, ..member });
        }
        let (mut state, mut now_ms) = (PolicyState::new(Tree::new(settings.clone()).unwrap()), 0);
        for (after_ms, shown) in moments {
            now_ms += after_ms;
            let shown = settings.machines.iter().zip(shown).map(|(member, (has, active, free))| MachineView {
                reported_free: MIB(free.min(has)),
                rungs: Rungs::NONE.with(Rung::GuestFree).with(Rung::Disk),
                ..view(member.id.0, has, active)
            });
            let view = HostView { now_ms, ..plenty(shown.collect()) };
            let plan = decide(&view, &mut state);
            for group in &settings.groups {
                let inside = machines_in(&settings, group.id);
                let stays = |id: &MachineId| first(&view, *id).consumed.saturating_sub(frees(&plan, id.0));
                let slivers = ByteCount(inside.len() as u64 * (63 << 12));
                let (stay, limit) = (inside.iter().map(stays).sum::<ByteCount>(), group.limit.unwrap());
                prop_assert!(stay <= limit + slivers, "{stay} of {limit} stay in {} in {plan:?}", group.id);
            }
        }
    }

    #[test]
    fn who_gives_for_a_limit_is_who_loses_the_auction_page_by_page(tree in tree(), view in moment()) {
        let mut settings = small(&tree).settings().clone();
        settings.machines.iter_mut().for_each(|machine| machine.highest = Rung::Disk);
        let mut view = HostView { now_ms: 0, ..plenty(view.machines) };
        for shown in &mut view.machines {
            let active = shown.active.map(|mut active| { active.bytes /= 64; active });
            let consumed = ByteCount(shown.consumed.0 / 64);
            *shown = MachineView { active, rungs: Rungs::NONE.with(Rung::Disk), ..MachineView::new(shown.id, consumed) };
        }
        let plan = decided(settings.clone(), &view);
        let tree = Tree::new(settings.clone()).unwrap();
        prop_assert_eq!(plan.state, HostState::High);
        let has = |id| pages(first(&view, id).consumed).min(tree.terms(id).unwrap().size.0);
        // Each bids for what may stay, from what nothing takes it below to what it has.
        let bids: BTreeMap<MachineId, Bid> = plan.machines.iter().map(|one| {
            let (id, terms) = (one.machine, tree.terms(one.machine).unwrap());
            let excess = pages(one.consumed).saturating_sub(pages(one.target));
            let cap = has(id).min(terms.cap.0);
            let floor = if terms.hold == Hold::Dedicated { cap } else { has(id).saturating_sub(excess).min(cap) };
            (id, Bid { floor, lift: 0, cap, active: pages(one.active), shares: terms.shares.0.into() })
        }).collect();
        settings.groups.iter_mut().for_each(|group| group.reservation = None);
        let (mut kept, tax) = (BTreeMap::new(), u64::from(settings.tax.rate().0 / 10_000));
        by_hand(&settings, None, bids.values().map(|bid| bid.cap).sum(), &bids, tax, &mut kept);
        for (id, kept) in kept {
            prop_assert_eq!(pages(frees(&plan, id.0)), has(id) - kept, "{}", id);
        }
    }

    #[test]
    fn no_more_is_taken_for_limits_than_is_above_them(
        tree in tree(), moments in prop::collection::vec(moment(), 1..4),
    ) {
        let mut settings = tree.settings().clone();
        settings.machines.iter_mut().for_each(|machine| machine.highest = Rung::Disk);
        let mut state = PolicyState::new(Tree::new(settings).unwrap());
        for (view, now_ms) in moments.into_iter().zip(0..) {
            let mut view = HostView { now_ms: now_ms * 1000, ..plenty(view.machines) };
            for shown in &mut view.machines {
                (shown.balloon, shown.rungs) = (None, Rungs::ALL);
            }
            let plan = decide(&view, &mut state);
            prop_assert_eq!(plan.state, HostState::High);
            let settings = state.tree().settings();
            let terms = |id| state.tree().terms(id).unwrap();
            let has = |id: MachineId| pages(first(&view, id).consumed).min(terms(id).size.0);
            let decided: Vec<MachineId> = plan.machines.iter().map(|one| one.machine).collect();
            let above = |group: &GroupSettings| {
                let inside = machines_in(settings, group.id);
                let sum: u64 = decided.iter().filter(|id| inside.contains(id)).map(|id| has(*id)).sum();
                sum.saturating_sub(group.limit.map_or(u64::MAX, pages))
            };
            // Those in it for limits further in, or all of them for its own: whichever is more. A group's number is above
            // its parent's.
            let mut needed: BTreeMap<Option<GroupId>, u64> = BTreeMap::new();
            for machine in settings.machines.iter().filter(|machine| decided.contains(&machine.id)) {
                *needed.entry(machine.parent).or_default() += has(machine.id).saturating_sub(terms(machine.id).cap.0);
            }
            for group in settings.groups.iter().rev() {
                let own = needed.entry(Some(group.id)).or_default();
                *own = above(group).max(*own);
                let own = *own;
                *needed.entry(group.parent).or_default() += own;
            }
            let mut around: BTreeMap<GroupId, u64> = BTreeMap::new();
            for group in &settings.groups {
                let outer = group.parent.map_or(0, |parent| around[&parent]);
                around.insert(group.id, outer.max(above(group)));
                let most = needed[&Some(group.id)].max(outer);
                let taken: ByteCount = machines_in(settings, group.id).iter().map(|id| frees(&plan, id.0)).sum();
                prop_assert!(taken.0 <= most << 12, "{}: {taken} taken of {most} pages", group.id);
            }
            let taken: ByteCount = decided.iter().map(|id| frees(&plan, id.0)).sum();
            prop_assert!(taken.0 <= needed.get(&None).copied().unwrap_or_default() << 12, "{} in all", taken);
        }
    }

    #[test]
    fn a_limit_is_kept_in_every_state_of_the_host(
        consumed in 100..8000u64, limit in 1..8000u64, free in 0..3000u64, pinned in 0..4000u64,
        rung in prop::sample::select(vec![Rung::Compress, Rung::Disk]),
    ) {
        let shown = MachineView {
            pinned: MIB(pinned.min(consumed)),
            rungs: Rungs::NONE.with(rung),
            ..view(1, consumed, 100)
        };
        let (movable, total) = (consumed - pinned.min(consumed), MIB(16 << 10));
        let machines = vec![shown, view(2, 8192, 8192)];
        let settings = [limited(1, 8192, limit), machine(2, 8192, 0, 1000)];
        let settings = Settings { machines: settings.to_vec(), ..Settings::new(MIB(1 << 20)) };
        let keeps = if rung == Rung::Compress { settings.costs.0[rung as usize].keeps } else { Ppm::ZERO };
        let plan = decided(settings, &HostView { now_ms: 0, total, free: MIB(free), overdrawn: MIB(0), machines });
        let most = ByteCount(keeps.rest().apply(MIB(movable).0));
        let above = MIB(consumed.saturating_sub(limit));
        let taken = frees(&plan, 1);
        prop_assert!(taken >= above.min(most), "{taken} of {above} while {}", plan.state);
        // And a host that may take as much on that rung as it is short of takes all of it.
        let excess = MIB(consumed).saturating_sub(target(&plan, 1));
        if plan.state.deepest() >= Some(rung) {
            prop_assert_eq!(taken, excess.min(most));
        }
    }
}

#[test]
fn a_page_above_a_limit_goes_at_once_and_a_guest_that_presses_on_it_is_not_asked_each_second() {
    let mut world = World::new(16 << 10, 0, &[limited(1, 8192, 2048)], vec![view(1, 2048, 2048)]);
    let page = ByteCount(4096);
    let (mut asked, mut most) = (Vec::new(), ByteCount(0));
    for second in 0..150 {
        world.machine(1).consumed += page;
        most = most.max(world.consumed(1));
        if frees(&world.step(), 1) > ByteCount(0) {
            asked.push(second);
        }
    }
    assert_eq!(asked, [0, 60, 120]);
    assert!(most < MIB(2048) + ByteCount(64 << 12), "it came to {most}");
    // What is more than a sliver goes at once.
    world.machine(1).consumed += MIB(1);
    assert!(frees(&world.step(), 1) >= MIB(1));
    assert_eq!(world.consumed(1), MIB(2048));
    assert!(why(&world.step(), 1).is_empty());
}
