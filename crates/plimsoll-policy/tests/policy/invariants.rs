//! What holds of every plan, over random hosts that show hostile numbers.
//!
//! A failing case is shrunk and kept in `tests/policy/invariants.proptest-regressions`, from where it is run again
//! first.
use plimsoll_policy::auction::IdleTax;
use plimsoll_policy::costs::{Cost, Losses};
use plimsoll_policy::host_state::HostState;
use plimsoll_policy::reason::Need;
use plimsoll_policy::settings::{Face, GroupSettings, Hold, MachineSettings, Settings, Shares, Terms};
use plimsoll_policy::tree::Tree;
use plimsoll_policy::view::{GuestStatistics, HostView, MachineView, Phase, Reading};
use plimsoll_policy::{Action, Costs, Plan, PolicyState, Position, Ppm, Reason, Rung, Rungs, Step, decide};
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId, PageCount};
use proptest::prelude::{
    Just, ProptestConfig, Strategy, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest,
};
use proptest::test_runner::FileFailurePersistence;
use std::collections::{BTreeMap, BTreeSet};

const MIB: u64 = 1 << 20;
/// Groups there are at most, machines at most.
const GROUPS: u32 = 4;
const MACHINES: u32 = 12;

fn face() -> impl Strategy<Value = Face> {
    let sizes = || (1..400u64, 0..400u64, 0..400u64);
    let shares = prop::sample::select(vec![1, 100, 5000, 1_000_000]);
    prop_oneof![
        6 => (sizes(), shares).prop_map(|((size, one, other), shares)| {
            let (low, high) = (one.min(other), one.max(other));
            Face::Guarantee {
                size: ByteCount(size.max(high) * MIB),
                reservation: ByteCount(low / 4 * MIB),
                limit: ByteCount(high.max(1) * MIB),
                shares: Shares(shares),
            }
        }),
        3 => (sizes(), 0..=2_000_000u32, 0..=10_000u32).prop_map(|((one, two, three), buffer, weight)| {
            let mut sorted = [one, two + 1, three + 1];
            sorted.sort_unstable();
            let [minimum, startup, maximum] = sorted.map(|mib| ByteCount(mib * MIB));
            Face::Dynamic { startup, minimum: ByteCount(minimum.0 / 4 / MIB * MIB), maximum, buffer: Ppm(buffer), weight }
        }),
        1 => (1..100u64).prop_map(|size| Face::Static { size: ByteCount(size * MIB) }),
        1 => (1..100u64).prop_map(|size| Face::Dedicated { size: ByteCount(size * MIB) }),
    ]
}

/// Costs of any kind, with losses and without.
fn costs() -> impl Strategy<Value = Costs> {
    let losses =
        || prop::option::of(prop::array::uniform6(0..=1_000_000u32).prop_map(|all| Losses(all.map(Ppm))));
    let cost = (any::<u32>(), any::<u32>(), 0..1_000_000u32, losses(), losses());
    let cost = cost.prop_map(|(take, back, keeps, busy, idle)| Cost {
        busy,
        idle,
        ..Cost::new(take.into(), back.into(), Ppm(keeps))
    });
    prop_oneof![Just(Costs::MEASURED), prop::array::uniform5(cost).prop_map(Costs)]
}

/// Settings that can be: groups nested at random, some with reservations of their own and with limits, both of which cover what
/// is nested.
pub(crate) fn tree() -> impl Strategy<Value = Tree> {
    let own = prop::option::of(0..600u64);
    let group = (0..=GROUPS, own, prop::option::of(0..3000u64), 1..10_000u32);
    let machine = (face(), 0..=GROUPS, prop::sample::select(Rung::ALL.to_vec()));
    let tax = prop::sample::select(vec![0, 50, 75, 99]);
    let nested = (
        prop::collection::vec(group, 0..=GROUPS as usize),
        prop::collection::vec(machine, 1..=MACHINES as usize),
        (tax, costs()),
    );
    nested.prop_map(|(groups, machines, (tax, costs))| {
        let parent = |at_most: usize, wanted: u32| {
            (wanted > 0 && wanted as usize <= at_most).then_some(GroupId(wanted))
        };
        let mut settings = Settings {
            tax: IdleTax::new(Ppm::percent(tax)).unwrap(),
            costs,
            ..Settings::new(ByteCount(1 << 50))
        };
        for ((face, group, highest), id) in machines.into_iter().zip(1..) {
            let new = MachineSettings::new(MachineId(id), face);
            settings.machines.push(MachineSettings { parent: parent(groups.len(), group), highest, ..new });
        }
        // From the innermost outward: a group's number is above its parent's.
        for (index, (up, own, limit, shares)) in groups.into_iter().enumerate().rev() {
            let id = GroupId(u32::try_from(index).unwrap() + 1);
            let inside = promised_in(&settings, id);
            let reservation = own.map(|mib| inside + ByteCount(mib * MIB));
            settings.groups.push(GroupSettings {
                id,
                parent: parent(index, up),
                reservation,
                limit: limit.map(|mib| reservation.unwrap_or(inside).max(ByteCount(mib * MIB))),
                shares: Shares(shares),
                domain: limit.map(|_| DomainId(id.0)),
            });
        }
        settings.groups.reverse();
        Tree::new(settings).unwrap()
    })
}

/// What is reserved of the machines and groups in a group.
fn promised_in(settings: &Settings, group: GroupId) -> ByteCount {
    let machines = settings.machines.iter().filter(|machine| machine.parent == Some(group));
    let groups = settings.groups.iter().filter(|nested| nested.parent == Some(group));
    let machines = machines.map(|machine| Terms::of(machine).unwrap().floor.bytes());
    machines
        .chain(groups.map(|nested| nested.reservation.unwrap_or_else(|| promised_in(settings, nested.id))))
        .sum()
}

/// A number that may be anything.
fn reading() -> impl Strategy<Value = Option<Reading>> {
    prop_oneof![
        4 => (0..400i64, 0..30_000u64).prop_map(|(mib, age_ms)| Some(Reading { bytes: mib << 20, age_ms })),
        1 => Just(None),
        1 => (any::<i64>(), any::<u64>()).prop_map(|(bytes, age_ms)| Some(Reading { bytes, age_ms })),
    ]
}

fn shown() -> impl Strategy<Value = MachineView> {
    let sizes = (0..400u64, 0..100u64, 0..100u64, 0..100u64, 0..100u64);
    let guest =
        prop::option::of((any::<i64>(), any::<i64>(), 0..60_000u64).prop_map(|(total, free, age_ms)| {
            // Half of them may be meant seriously.
            let seriously = |bytes: i64| if bytes % 2 == 0 { bytes.rem_euclid(400 << 20) } else { bytes };
            GuestStatistics { total: seriously(total), free: seriously(free), age_ms }
        }));
    let pages = (0..50_000u64, 0..50_000u64);
    let rest = (any::<bool>(), 0..1_500_000u32, prop::option::of(0..400u64), 0..32u8);
    (1..=MACHINES + 1, sizes, reading(), guest, pages, rest).prop_map(
        |(id, (consumed, stored, pinned, free, twins), active, guest, (taken, returned), rest)| {
            let (starts, stalled, balloon, rungs) = rest;
            let bytes = |mib: u64| ByteCount(mib * MIB);
            let of_it = |mib: u64| bytes(mib.min(consumed / 5));
            let has = |set: Rungs, rung: Rung| {
                if rungs & 1 << rung as u8 == 0 { set } else { set.with(rung) }
            };
            MachineView {
                phase: if starts { Phase::Starting } else { Phase::Running },
                stored: of_it(stored),
                pinned: of_it(pinned),
                reported_free: bytes(free.min(consumed * 2 / 5)),
                mergeable: of_it(twins),
                active,
                guest,
                taken: PageCount(taken),
                returned: PageCount(returned),
                stalled: Ppm(stalled),
                balloon: balloon.map(bytes),
                rungs: Rung::ALL.into_iter().fold(Rungs::NONE, has),
                ..MachineView::new(MachineId(id), bytes(consumed))
            }
        },
    )
}

/// A host at one moment. The clock may stand still, jump, or go back.
pub(crate) fn moment() -> impl Strategy<Value = HostView> {
    let machines = prop::collection::vec(shown(), 0..=MACHINES as usize + 2);
    let now = prop_oneof![9 => 0..200_000u64, 1 => any::<u64>()];
    let room = prop_oneof![9 => 0..3000i64, 1 => -3000..0i64];
    (now, 1..8192u64, room, machines).prop_map(|(now_ms, total, room, machines)| HostView {
        now_ms,
        total: ByteCount(total * MIB),
        free: ByteCount(room.max(0).unsigned_abs() * MIB),
        overdrawn: ByteCount(room.min(0).unsigned_abs() * MIB),
        machines,
    })
}

pub(crate) fn pages(bytes: ByteCount) -> u64 {
    bytes.pages_floor().0
}

/// The view of a machine that was decided about: the first of its id.
pub(crate) fn first(view: &HostView, id: MachineId) -> &MachineView {
    view.machines.iter().find(|machine| machine.id == id).unwrap()
}

pub(crate) fn config(cases: u32) -> ProptestConfig {
    let persistence = FileFailurePersistence::WithSource("proptest-regressions");
    ProptestConfig { cases, failure_persistence: Some(Box::new(persistence)), ..ProptestConfig::default() }
}

/// What was taken from each machine, but for what its guest had free.
pub(crate) fn taken_in_use(plan: &Plan) -> BTreeMap<MachineId, u64> {
    let mut sums = BTreeMap::new();
    for action in &plan.actions {
        if let Step::Take { rung, frees, .. } = action.step
            && rung != Rung::GuestFree
        {
            *sums.entry(action.machine).or_default() += frees.0;
        }
    }
    sums
}

/// Whether anything is taken from a machine, or it is said why not.
fn gives(plan: &Plan, id: MachineId) -> bool {
    plan.actions.iter().any(|action| action.machine == id && matches!(action.step, Step::Take { .. }))
        || plan
            .reasons
            .iter()
            .any(|note| note.machine == Some(id) && matches!(note.reason, Reason::Uncovered { .. }))
}

/// What a machine's balloon is asked to hold.
fn balloon_asks(plan: &Plan, id: MachineId) -> Vec<ByteCount> {
    let asked = |action: &Action| match action.step {
        Step::Balloon(holds) if action.machine == id => Some(holds),
        _ => None,
    };
    plan.actions.iter().filter_map(asked).collect()
}

/// What a machine needs, by the reason of its first target.
fn first_need(plan: &Plan, id: MachineId) -> Option<Need> {
    plan.actions.iter().filter(|action| action.machine == id).find_map(|action| match action.reason {
        Reason::TargetMoved { need, .. } => Some(need),
        _ => None,
    })
}

/// The machines of a group and of those nested in it.
pub(crate) fn machines_in(settings: &Settings, group: GroupId) -> BTreeSet<MachineId> {
    let members = settings.machines.iter().filter(|machine| machine.parent == Some(group));
    let nested = settings.groups.iter().filter(|nested| nested.parent == Some(group));
    members
        .map(|machine| machine.id)
        .chain(nested.flat_map(|nested| machines_in(settings, nested.id)))
        .collect()
}

/// Whether a machine takes up more than its limit, or those of a group it is in more than that one's.
fn is_above_a_limit(tree: &Tree, plan: &Plan, id: MachineId, view: &HostView) -> bool {
    let terms = tree.terms(id).unwrap();
    first(view, id).consumed.min(terms.size.bytes()) > terms.cap.bytes()
        || is_in_a_group_above(tree, plan, id, view)
}

/// Whether the machines of a group it is in take up more than that one's limit.
pub(crate) fn is_in_a_group_above(tree: &Tree, plan: &Plan, id: MachineId, view: &HostView) -> bool {
    let has = |id: MachineId| first(view, id).consumed.min(tree.terms(id).unwrap().size.bytes());
    let is_above = |group: &GroupSettings| {
        let inside = machines_in(tree.settings(), group.id);
        let decided = plan.machines.iter().filter(|one| inside.contains(&one.machine));
        let sum: ByteCount = decided.map(|one| has(one.machine)).sum();
        inside.contains(&id) && group.limit.is_some_and(|limit| sum > limit)
    };
    tree.settings().groups.iter().any(is_above)
}

/// What the machines that were decided about bid, floors not raised.
fn bids(tree: &Tree, plan: &Plan) -> BTreeMap<MachineId, Bid> {
    let bid = |one: &Position| {
        let terms = tree.terms(one.machine).unwrap();
        let (floor, cap, shares) = (terms.floor.0, terms.cap.0, u64::from(terms.shares.0));
        (one.machine, Bid { floor, lift: 0, cap, active: pages(one.active), shares })
    };
    plan.machines.iter().map(bid).collect()
}

proptest! {
    #![proptest_config(config(600))]

    #[test]
    fn guarantees_limits_and_the_budget_are_kept(tree in tree(), moments in prop::collection::vec(moment(), 1..5)) {
        let mut state = PolicyState::new(tree);
        for view in moments {
            let plan = decide(&view, &mut state);
            let budget = pages(plan.budget);
            let terms = |id| state.tree().terms(id).unwrap();
            let floors = bid_of(state.tree().settings(), None, &bids(state.tree(), &plan)).floor;
            let entitled: u64 = plan.machines.iter().map(|one| pages(one.entitlement)).sum();
            let targets: u64 = plan.machines.iter().map(|one| pages(one.target)).sum();
            prop_assert!(entitled <= budget.max(floors), "{entitled} entitled of {budget}, {floors} guaranteed");
            prop_assert!(targets <= budget.max(floors), "{targets} targeted of {budget}, {floors} guaranteed");
            for one in &plan.machines {
                let (terms, shown) = (terms(one.machine), first(&view, one.machine));
                prop_assert!(pages(one.entitlement) >= terms.floor.0 && pages(one.entitlement) <= terms.cap.0);
                // What the guest uses of its guarantee stays, whatever is aimed at, taken, or asked of its balloon.
                let in_use = shown.consumed.saturating_sub(shown.reported_free);
                let kept = terms.floor.bytes().min(in_use);
                prop_assert!(pages(one.target) >= pages(kept), "{} aims at {}", one.machine, one.target);
                prop_assert!(pages(one.target) <= terms.cap.0);
                let taken = taken_in_use(&plan).get(&one.machine).copied().unwrap_or_default();
                let left = shown.consumed.saturating_sub(ByteCount(taken));
                prop_assert!(left >= kept, "{} was left {left}", one.machine);
                prop_assert!(taken == 0 || left >= one.target);
                // A balloon may be on its way already.
                let is_above = shown.consumed.min(terms.size.bytes()) > terms.cap.bytes();
                prop_assert!(!is_above || gives(&plan, one.machine) || shown.balloon.is_some(), "{} keeps more than its limit", one.machine);
                for asked in balloon_asks(&plan, one.machine) {
                    let most = shown.balloon.unwrap_or_default().max(terms.size.saturating_sub(terms.floor).bytes());
                    prop_assert!(asked <= most, "the balloon of {} is to hold {asked}", one.machine);
                }
            }
        }
    }

    #[test]
    fn no_group_is_below_its_reservation_or_above_its_limit(
        tree in tree(), moments in prop::collection::vec(moment(), 1..6),
    ) {
        let mut state = PolicyState::new(tree);
        for view in moments {
            let plan = decide(&view, &mut state);
            let (settings, bids) = (state.tree().settings(), bids(state.tree(), &plan));
            for group in &settings.groups {
                let inside = machines_in(settings, group.id);
                let sum = |of: fn(&Position) -> ByteCount| -> u64 {
                    plan.machines.iter().filter(|one| inside.contains(&one.machine)).map(|one| pages(of(one))).sum()
                };
                // A reservation holds as far as its machines may have so much.
                let bid = bid_of(settings, Some(group), &bids);
                let (entitled, targets) = (sum(|one| one.entitlement), sum(|one| one.target));
                prop_assert!((bid.floor..=bid.cap).contains(&entitled), "{}: {entitled} entitled", group.id);
                prop_assert!(targets <= bid.cap, "{}: {targets} targeted, {} at most", group.id, bid.cap);
            }
        }
    }

    #[test]
    fn nobody_is_paged_who_must_not_be(tree in tree(), moments in prop::collection::vec(moment(), 1..5)) {
        let mut state = PolicyState::new(tree);
        for view in moments {
            let plan = decide(&view, &mut state);
            let mut paged: BTreeMap<MachineId, u64> = BTreeMap::new();
            for action in &plan.actions {
                let (terms, shown) = (state.tree().terms(action.machine).unwrap(), first(&view, action.machine));
                let Step::Take { rung, pages, frees } = action.step else { continue };
                prop_assert!(rung <= terms.highest && shown.rungs.has(rung) && terms.hold != Hold::Dedicated);
                let may_go = plan.state.deepest().is_some_and(|deepest| rung <= deepest);
                prop_assert!(may_go || is_above_a_limit(state.tree(), &plan, action.machine, &view));
                prop_assert!(rung != Rung::Sharing || state.tree().domain(action.machine).is_some());
                prop_assert!(frees > ByteCount(0) && frees <= pages.bytes());
                if rung.pages_out() {
                    *paged.entry(action.machine).or_default() += frees.0;
                }
            }
            for (id, frees) in paged {
                let shown = first(&view, id);
                prop_assert!(frees <= shown.consumed.saturating_sub(shown.reported_free + shown.pinned).0);
            }
        }
    }

    #[test]
    fn entitlements_are_the_budget_to_the_page_where_no_group_is_at_its_limit(
        tree in tree(), view in moment(),
    ) {
        let mut settings = tree.settings().clone();
        settings.groups.iter_mut().for_each(|group| group.limit = None);
        let mut state = PolicyState::new(Tree::new(settings).unwrap());
        let plan = decide(&view, &mut state);
        let host = bid_of(state.tree().settings(), None, &bids(state.tree(), &plan));
        let entitled: u64 = plan.machines.iter().map(|one| pages(one.entitlement)).sum();
        prop_assert_eq!(entitled, pages(plan.budget).clamp(host.floor, host.cap));
        // Nor does anybody want what nobody has.
        let targets: u64 = plan.machines.iter().map(|one| pages(one.target)).sum();
        let wants_more = |one: &&Position| first_need(&plan, one.machine).is_some_and(|need| one.target < need.wanted);
        let unmet = plan.machines.iter().find(wants_more);
        prop_assert!(unmet.is_none() || targets >= pages(plan.budget), "{unmet:?} with {targets} of {}", plan.budget);
    }

    #[test]
    fn a_decision_replays_to_the_bit(tree in tree(), moments in prop::collection::vec(moment(), 1..5)) {
        let mut state = PolicyState::new(tree);
        for view in moments {
            let recorded = serde_json::to_string(&(&view, &state)).unwrap();
            let plan = decide(&view, &mut state);
            let (view, mut replayed): (HostView, PolicyState) = serde_json::from_str(&recorded).unwrap();
            let again = decide(&view, &mut replayed);
            prop_assert_eq!(&plan, &again);
            prop_assert_eq!(&state, &replayed);
            let written = serde_json::to_string(&plan).unwrap();
            prop_assert_eq!(serde_json::from_str::<Plan>(&written).unwrap(), plan);
        }
    }

    #[test]
    fn the_order_in_which_machines_are_shown_is_no_matter(tree in tree(), view in moment(), by in 0..20usize) {
        let mut seen = std::collections::BTreeSet::new();
        let mut machines = view.machines.clone();
        machines.retain(|machine| seen.insert(machine.id));
        let view = HostView { machines, ..view };
        let mut turned = view.clone();
        let by = by.min(turned.machines.len());
        turned.machines.rotate_left(by);
        let mut state = PolicyState::new(tree);
        prop_assert_eq!(decide(&turned, &mut state.clone()), decide(&view, &mut state));
    }

    #[test]
    fn a_bad_sample_changes_nothing_for_the_others(
        tree in tree(), views in (moment(), moment()), bytes in prop_oneof![i64::MIN..0, 1i64 << 40..i64::MAX],
    ) {
        let (before, mut after) = views;
        let mut state = PolicyState::new(tree);
        decide(&before, &mut state);
        let Some(machine) = after.machines.first_mut() else { return Ok(()) };
        let id = machine.id;
        machine.active = None;
        let missing = decide(&after, &mut state.clone());
        after.machines[0].active = Some(Reading { bytes, age_ms: 0 });
        let bad = decide(&after, &mut state);
        prop_assert_eq!(&missing.machines, &bad.machines);
        prop_assert_eq!(&missing.actions, &bad.actions);
        let is_named = bad.reasons.iter().any(|note| {
            note.machine == Some(id) && matches!(note.reason, Reason::BadSample { .. })
        });
        prop_assert!(is_named || state.tree().terms(id).is_none() || missing.machines.iter().all(|one| one.machine != id));
    }

    #[test]
    fn what_happens_inside_a_group_is_no_matter_of_another(
        tree in tree(), moments in prop::collection::vec(moment(), 1..4),
        shares in 1..1_000_000u32, stalled in 0..1_000_000u32,
    ) {
        let Some(group) = tree.settings().groups.first().map(|group| group.id) else { return Ok(()) };
        let inside = machines_in(tree.settings(), group);
        let mut settings = tree.settings().clone();
        for machine in settings.machines.iter_mut().filter(|one| inside.contains(&one.id)) {
            if let Face::Guarantee { shares: own, .. } = &mut machine.face {
                *own = Shares(shares);
            }
        }
        let (mut before, mut after) = (PolicyState::new(tree), PolicyState::new(Tree::new(settings).unwrap()));
        for (moment, view) in moments.into_iter().enumerate() {
            let mut other = view.clone();
            for machine in other.machines.iter_mut().filter(|one| inside.contains(&one.id)) {
                machine.stalled = Ppm(stalled);
            }
            let (before, after) = (decide(&view, &mut before), decide(&other, &mut after));
            let sum = |plan: &Plan| -> u64 {
                plan.machines.iter().filter(|one| inside.contains(&one.machine)).map(|one| pages(one.entitlement)).sum()
            };
            prop_assert_eq!(sum(&before), sum(&after), "the group itself");
            for (one, other) in before.machines.iter().zip(&after.machines).filter(|(one, _)| !inside.contains(&one.machine)) {
                // Targets are damped afterwards, in what room all of them leave.
                let other = if moment == 0 { *other } else { Position { target: one.target, ..*other } };
                prop_assert_eq!(*one, other);
            }
        }
    }

    #[test]
    fn more_shares_never_bring_a_lower_entitlement(tree in tree(), view in moment(), more in 1..1_000_000u32) {
        let mut settings = tree.settings().clone();
        let id = settings.machines[0].id;
        let Face::Guarantee { shares, .. } = &mut settings.machines[0].face else { return Ok(()) };
        *shares = Shares((shares.0 + more).min(1_000_000));
        let entitlement = |tree| {
            let plan = decide(&view, &mut PolicyState::new(tree));
            plan.machines.iter().find(|one| one.machine == id).map(|one| one.entitlement)
        };
        prop_assert!(entitlement(Tree::new(settings).unwrap()) >= entitlement(tree));
    }
}

/// Settings of machines so small that their pages can be auctioned one by one.
pub(crate) fn small(tree: &Tree) -> Tree {
    let less = |bytes: &mut ByteCount| bytes.0 /= 64;
    let mut settings = tree.settings().clone();
    for group in &mut settings.groups {
        [&mut group.reservation, &mut group.limit].into_iter().flatten().for_each(less);
    }
    for machine in &mut settings.machines {
        match &mut machine.face {
            Face::Guarantee { size, reservation, limit, .. } => {
                [size, reservation, limit].into_iter().for_each(less)
            }
            Face::Dynamic { startup, minimum, maximum, .. } => {
                [startup, minimum, maximum].into_iter().for_each(less)
            }
            Face::Static { size } | Face::Dedicated { size } => less(size),
        }
    }
    Tree::new(settings).unwrap()
}

/// What a machine or a group bids.
#[derive(Clone, Copy)]
pub(crate) struct Bid {
    pub(crate) floor: u64,
    /// What its floor is raised by, if its siblings have so much above theirs.
    pub(crate) lift: u64,
    pub(crate) cap: u64,
    pub(crate) active: u64,
    pub(crate) shares: u64,
}

/// A page at a time, to the lowest cost per share; the first of equals. In the paper's terms: `100 - tax` for a page
/// in use, 100 for an idle one.
fn page_by_page(pages: u64, bids: &[Bid], tax: u64) -> Vec<u64> {
    let mut held: Vec<u64> = bids.iter().map(|bid| bid.floor).collect();
    let cost =
        |bid: &Bid, held: u64| held.min(bid.active) * (100 - tax) + held.saturating_sub(bid.active) * 100;
    for _ in held.iter().sum()..pages {
        let open = (0..bids.len()).filter(|index| held[*index] < bids[*index].cap);
        let next =
            |index: usize| (u128::from(cost(&bids[index], held[index] + 1)), u128::from(bids[index].shares));
        let cheapest = open.min_by(|one, other| {
            let ((cost, shares), (others, of)) = (next(*one), next(*other));
            (cost * of).cmp(&(others * shares))
        });
        let Some(winner) = cheapest else { break };
        held[winner] += 1;
    }
    held
}

/// Auctions at each group from the host inward, written down anew. `parent` is whose auction it is.
pub(crate) fn by_hand(
    settings: &Settings,
    parent: Option<GroupId>,
    pages: u64,
    machines: &BTreeMap<MachineId, Bid>,
    tax: u64,
    grants: &mut BTreeMap<MachineId, u64>,
) {
    // The room lists groups in the order of their level and number, and machines by number.
    let groups: Vec<&GroupSettings> = settings.groups.iter().filter(|group| group.parent == parent).collect();
    let members: Vec<MachineId> = settings
        .machines
        .iter()
        .filter(|machine| machine.parent == parent && machines.contains_key(&machine.id))
        .map(|machine| machine.id)
        .collect();
    let mut bids: Vec<Bid> = groups
        .iter()
        .map(|group| bid_of(settings, Some(group), machines))
        .chain(members.iter().map(|id| machines[id]))
        .collect();
    raise(&mut bids, pages, tax);
    let held = page_by_page(pages, &bids, tax);
    for (group, won) in groups.iter().zip(&held) {
        by_hand(settings, Some(group.id), *won, machines, tax, grants);
    }
    grants.extend(members.into_iter().zip(held[groups.len()..].iter().copied()));
}

/// Raises floors by what is above all of them, a page at a time and by shares alone: what is wanted urgently is all in use.
fn raise(bids: &mut [Bid], pages: u64, tax: u64) {
    let room = pages.saturating_sub(bids.iter().map(|bid| bid.floor).sum());
    let lift = |bid: &Bid| bid.lift.min(bid.cap.saturating_sub(bid.floor));
    let lifts: Vec<Bid> =
        bids.iter().map(|bid| Bid { floor: 0, cap: lift(bid), active: lift(bid), ..*bid }).collect();
    let raised = page_by_page(room, &lifts, tax);
    bids.iter_mut().zip(raised).for_each(|(bid, lift)| bid.floor += lift);
}

/// The sum of what is nested in a group, at least what it reserves and within its limit; of the host, which has neither, without one.
fn bid_of(settings: &Settings, group: Option<&GroupSettings>, machines: &BTreeMap<MachineId, Bid>) -> Bid {
    let parent = group.map(|group| group.id);
    let nested = settings.groups.iter().filter(|nested| nested.parent == parent);
    let members = settings.machines.iter().filter(|machine| machine.parent == parent);
    let inside: Vec<Bid> = nested
        .map(|nested| bid_of(settings, Some(nested), machines))
        .chain(members.filter_map(|machine| machines.get(&machine.id).copied()))
        .collect();
    let sum = |of: fn(&Bid) -> u64| inside.iter().map(of).sum::<u64>();
    let cap = group.and_then(|group| group.limit).map_or(u64::MAX, pages).min(sum(|bid| bid.cap));
    let own = group.and_then(|group| group.reservation).map_or(0, pages);
    let shares = group.map_or(1, |group| u64::from(group.shares.0));
    let floor = sum(|bid| bid.floor).max(own).min(cap);
    Bid { floor, lift: 0, cap, active: sum(|bid| bid.active.min(bid.cap)), shares }
}

proptest! {
    #![proptest_config(config(100))]

    #[test]
    fn what_is_seen_again_and_again_moves_no_target_any_more(tree in tree(), view in moment()) {
        let mut view = HostView { now_ms: 0, ..view };
        let mut state = PolicyState::new(tree);
        let mut again = || {
            view.now_ms += 1000;
            let plan = decide(&view, &mut state);
            (plan.state, plan.machines)
        };
        // What comes back counts for a minute, fading; a floor is raised by a hundredth of its machine a second.
        let rested = (0..1200).map(|_| again()).last();
        for _ in 0..120 {
            prop_assert_eq!(Some(again()), rested.clone());
        }
    }
}

proptest! {
    #![proptest_config(config(150))]

    #[test]
    fn entitlements_are_those_of_auctions_held_page_by_page(tree in tree(), view in moment()) {
        let tree = small(&tree);
        let mut view = view;
        view.total.0 /= 64;
        view.free.0 /= 64;
        view.overdrawn.0 /= 64;
        for machine in &mut view.machines {
            machine.consumed.0 /= 64;
            machine.active = machine.active.map(|reading| Reading { bytes: reading.bytes / 64, ..reading });
        }
        let plan = decide(&view, &mut PolicyState::new(tree.clone()));
        let mut machines = bids(&tree, &plan);
        for action in &plan.actions {
            if let (Reason::TargetMoved { bounds, .. }, Some(bid)) = (action.reason, machines.get_mut(&action.machine)) {
                bid.lift = pages(bounds.lift);
            }
        }
        let mut grants = BTreeMap::new();
        let tax = u64::from(tree.settings().tax.rate().0 / 10_000);
        by_hand(tree.settings(), None, pages(plan.budget), &machines, tax, &mut grants);
        let entitled: BTreeMap<MachineId, u64> =
            plan.machines.iter().map(|one| (one.machine, pages(one.entitlement))).collect();
        prop_assert_eq!(entitled, grants);
    }
}

/// A group whose machines are at its limit, and one that has a reservation its machines do not have each.
#[test]
fn groups_keep_within_their_limits_and_have_their_reservations() {
    let mib = |count| ByteCount(count * MIB);
    let mut settings = Settings::new(mib(4096));
    let limit = Some(mib(600));
    let reservation = Some(mib(900));
    settings.groups = vec![
        GroupSettings { limit, shares: Shares(1_000_000), ..GroupSettings::new(GroupId(1)) },
        GroupSettings { reservation, shares: Shares(1), ..GroupSettings::new(GroupId(2)) },
    ];
    for (id, group) in [(1, Some(1)), (2, Some(1)), (3, Some(2)), (4, Some(2)), (5, None)] {
        let (size, reservation, shares) = (mib(1024), mib(0), Shares(5000));
        let face = Face::Guarantee { size, reservation, limit: size, shares };
        let parent = group.map(GroupId);
        settings.machines.push(MachineSettings { parent, ..MachineSettings::new(MachineId(id), face) });
    }
    let machines: Vec<MachineView> = (1..=5)
        .map(|id| MachineView {
            active: Some(Reading { bytes: 500 << 20, age_ms: 0 }),
            ..MachineView::new(MachineId(id), mib(500))
        })
        .collect();
    let view = HostView { now_ms: 0, total: mib(3000), free: mib(180), overdrawn: mib(0), machines };
    let plan = decide(&view, &mut PolicyState::new(Tree::new(settings).unwrap()));
    let of = |ids: &[u32]| -> u64 {
        let is_of = |id: &MachineId| ids.contains(&id.0);
        plan.machines.iter().filter(|one| is_of(&one.machine)).map(|one| one.entitlement.0).sum::<u64>() / MIB
    };
    assert_eq!((of(&[1, 2]), of(&[3, 4])), (600, 900));
    assert_eq!(of(&[1, 2, 3, 4, 5]), plan.budget.0 / MIB);
    assert_eq!(plan.state, HostState::High);
}
