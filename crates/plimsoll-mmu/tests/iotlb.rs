//! Commands for remapping hardware: every short sequence against an adversary that tries all it may, what each change of the mapper
//! needs, and that a frame is given back only when nobody can reach it.
#[expect(dead_code, reason = "these tests use a part of it")]
mod common;

use common::{Outside, Ram};
use plimsoll_mmu::format::amdvi::{self, Host};
use plimsoll_mmu::format::arm::{self, Second};
use plimsoll_mmu::format::vtd::{self, Second4};
use plimsoll_mmu::iotlb::{
    AmdVi, Change, Command, Context, Depth, Device, Drain, Kind, Maker, Missing, Smmu, Unit, Vtd, check,
    needed,
};
use plimsoll_mmu::tlb::{Breaks, Consequence};
use plimsoll_mmu::{
    Entry, Feature, Format, Input, Invalidate, Leaf, Level, Mapper, Memory, Output, Permissions, Pools,
    Shareability, Span, TableFrames, TableMemory,
};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

const DOMAIN: u16 = 5;
const OTHER_DOMAIN: u16 = 6;
const DEVICE: u16 = 0x18;
const OTHER_DEVICE: u16 = 0x20;
const LEAST: Consequence = Consequence::NeedlessFault;
const OPEN: Permissions = Permissions::all();
const CLOSED: Permissions = Permissions::all().difference(Permissions::WRITE);

fn span(first: u64, bytes: u64) -> Span {
    Span::new(Input(first), bytes).expect("fits")
}

const fn unit(maker: Maker) -> Unit {
    Unit { maker, absent: Feature::Off, breaks: Breaks::Spared }
}

const fn device(remote: Feature) -> Device {
    Device { id: DEVICE, remote }
}

/// What the adversary has in the world of the tests: one page, the table above it, one device.
type World = BTreeSet<Kind>;

/// What a unit that uses this may come to keep, by 6.2 of VT-d, 3.3 of 48882 and 3.9 of IHI 0070 read as badly as they can be.
fn may_make(kind: Kind) -> &'static [Kind] {
    match kind {
        Kind::Context => &[Kind::Structure, Kind::Leaf, Kind::Remote, Kind::Access],
        Kind::Structure => &[Kind::Leaf, Kind::Remote, Kind::Access],
        Kind::Leaf => &[Kind::Remote, Kind::Access],
        Kind::Remote | Kind::Access => &[],
    }
}

/// Everything that the adversary can have made of `world`, where `legal` is what there can be at all.
fn closure(world: &World, legal: &World) -> World {
    let made = world.iter().flat_map(|kind| may_make(*kind)).copied().filter(|kind| legal.contains(kind));
    world.iter().copied().chain(made).collect()
}

/// How much of a device's addresses the world is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    /// The page at 0.
    Page,
    /// All.
    Everything,
}

/// What a command certainly drops in a world; `None` for a wait.
fn dropped(command: &Command, about: About) -> Option<World> {
    let here = |pages: &Option<Span>| pages.is_none_or(|pages| about == About::Page && pages.first().0 == 0);
    let unit = |depth: Depth, accesses: bool| {
        let mut world = World::from([Kind::Leaf]);
        if depth == Depth::All {
            world.insert(Kind::Structure);
        }
        if accesses {
            world.insert(Kind::Access);
        }
        world
    };
    let when = |condition: bool, world: World| Some(if condition { world } else { World::new() });
    let context = World::from([Kind::Context]);
    let remote = World::from([Kind::Remote]);
    match *command {
        Command::Vtd(Vtd::ContextAll) => Some(context),
        Command::Vtd(Vtd::ContextDomain { domain }) => when(domain == DOMAIN, context),
        Command::Vtd(Vtd::ContextDevice { domain, device }) => {
            when(domain == DOMAIN && device == DEVICE, context)
        }
        Command::Vtd(Vtd::IotlbAll { drain }) => Some(unit(Depth::All, drain == Drain::On)),
        Command::Vtd(Vtd::IotlbDomain { domain, drain }) => {
            when(domain == DOMAIN, unit(Depth::All, drain == Drain::On))
        }
        Command::Vtd(Vtd::IotlbPages { domain, pages, depth, drain }) => {
            when(domain == DOMAIN && here(&Some(pages)), unit(depth, drain == Drain::On))
        }
        Command::Vtd(Vtd::DeviceTlb { device, pages })
        | Command::AmdVi(AmdVi::IotlbPages { device, pages })
        | Command::Smmu(Smmu::AtcInv { stream: device, pages }) => {
            when(device == DEVICE && here(&pages), remote)
        }
        Command::AmdVi(AmdVi::DevtabEntry { device }) => when(device == DEVICE, context),
        Command::AmdVi(AmdVi::Pages { domain, pages, depth }) => {
            when(domain == DOMAIN && here(&pages), unit(depth, true))
        }
        Command::AmdVi(AmdVi::All) => Some(&context | &unit(Depth::All, true)),
        Command::Smmu(Smmu::CfgiSte { stream }) => when(stream == DEVICE, context),
        Command::Smmu(Smmu::CfgiAll) => Some(context),
        Command::Smmu(Smmu::TlbiS2Ipa { vmid, pages, depth }) => {
            when(vmid == DOMAIN && here(&Some(pages)), unit(depth, true))
        }
        Command::Smmu(Smmu::TlbiS12Vmall { vmid }) => when(vmid == DOMAIN, unit(Depth::All, true)),
        Command::Smmu(Smmu::TlbiNsnhAll) => Some(unit(Depth::All, true)),
        Command::Vtd(Vtd::Wait) | Command::AmdVi(AmdVi::CompletionWait) | Command::Smmu(Smmu::Sync) => None,
    }
}

/// VT-d 6.5.2.11.
fn class(command: &Command) -> u8 {
    match command {
        Command::Vtd(Vtd::ContextAll | Vtd::ContextDomain { .. } | Vtd::ContextDevice { .. }) => 0,
        Command::Vtd(Vtd::DeviceTlb { .. }) => 2,
        _ => 1,
    }
}

/// Whether the adversary can have anything stale when software has seen the last wait. It carries each command out when it likes within
/// what is promised, and makes what it can at any time.
fn adversary_wins(legal: &World, about: About, commands: &[Command]) -> bool {
    let dropped = |command: &Command| dropped(command, about);
    let waits = commands.iter().rposition(|command| dropped(command).is_none());
    let commands = &commands[..waits.map_or(0, |last| last + 1)];
    let mut seen = BTreeSet::new();
    let mut open = vec![(closure(legal, legal), 0u32)];
    while let Some((world, done)) = open.pop() {
        if !seen.insert((world.clone(), done)) {
            continue;
        }
        if done.count_ones() as usize == commands.len() {
            if !world.is_empty() {
                return true;
            }
            continue;
        }
        for (index, command) in commands.iter().enumerate().filter(|(index, _)| done >> index & 1 == 0) {
            let ahead = commands[..index].iter().enumerate().filter(|(ahead, _)| done >> ahead & 1 == 0);
            let held = ahead.clone().any(|(_, ahead)| {
                dropped(ahead).is_none()
                    || dropped(command).is_none()
                    || (matches!(command, Command::Vtd(_)) && class(ahead) < class(command))
            });
            if held {
                continue;
            }
            let gone = dropped(command).unwrap_or_default();
            let left: World = world.difference(&gone).copied().collect();
            // It may have made more before, and may or may not make more now.
            open.push((closure(&left, legal), done | 1 << index));
            open.push((left, done | 1 << index));
        }
    }
    false
}

/// Every sequence of up to `length` of these.
fn sequences(alphabet: &[Command], length: usize) -> Vec<Vec<Command>> {
    let mut all = vec![vec![]];
    let mut last = all.clone();
    for _ in 0..length {
        last = last
            .iter()
            .flat_map(|sequence| {
                alphabet.iter().map(|command| sequence.iter().copied().chain([*command]).collect::<Vec<_>>())
            })
            .collect();
        all.extend(last.iter().cloned());
    }
    all
}

fn alphabet(maker: Maker) -> Vec<Command> {
    let (here, there) = (span(0, 0x1000), span(0x20_0000, 0x1000));
    match maker {
        Maker::Intel => vec![
            Command::Vtd(Vtd::ContextDevice { domain: DOMAIN, device: DEVICE }),
            Command::Vtd(Vtd::ContextDevice { domain: OTHER_DOMAIN, device: DEVICE }),
            Command::Vtd(Vtd::IotlbDomain { domain: DOMAIN, drain: Drain::On }),
            Command::Vtd(Vtd::IotlbPages {
                domain: DOMAIN,
                pages: here,
                depth: Depth::Leaves,
                drain: Drain::On,
            }),
            Command::Vtd(Vtd::IotlbPages {
                domain: DOMAIN,
                pages: here,
                depth: Depth::All,
                drain: Drain::Off,
            }),
            Command::Vtd(Vtd::IotlbPages {
                domain: DOMAIN,
                pages: there,
                depth: Depth::All,
                drain: Drain::On,
            }),
            Command::Vtd(Vtd::DeviceTlb { device: DEVICE, pages: Some(here) }),
            Command::Vtd(Vtd::DeviceTlb { device: DEVICE, pages: None }),
            Command::Vtd(Vtd::Wait),
        ],
        Maker::Amd => vec![
            Command::AmdVi(AmdVi::DevtabEntry { device: DEVICE }),
            Command::AmdVi(AmdVi::DevtabEntry { device: OTHER_DEVICE }),
            Command::AmdVi(AmdVi::Pages { domain: DOMAIN, pages: Some(here), depth: Depth::Leaves }),
            Command::AmdVi(AmdVi::Pages { domain: DOMAIN, pages: None, depth: Depth::All }),
            Command::AmdVi(AmdVi::Pages { domain: OTHER_DOMAIN, pages: None, depth: Depth::All }),
            Command::AmdVi(AmdVi::IotlbPages { device: DEVICE, pages: None }),
            Command::AmdVi(AmdVi::All),
            Command::AmdVi(AmdVi::CompletionWait),
        ],
        Maker::Arm => vec![
            Command::Smmu(Smmu::CfgiSte { stream: DEVICE }),
            Command::Smmu(Smmu::TlbiS2Ipa { vmid: DOMAIN, pages: here, depth: Depth::Leaves }),
            Command::Smmu(Smmu::TlbiS2Ipa { vmid: DOMAIN, pages: here, depth: Depth::All }),
            Command::Smmu(Smmu::TlbiS12Vmall { vmid: DOMAIN }),
            Command::Smmu(Smmu::TlbiS12Vmall { vmid: OTHER_DOMAIN }),
            Command::Smmu(Smmu::AtcInv { stream: DEVICE, pages: Some(here) }),
            Command::Smmu(Smmu::Sync),
        ],
    }
}

fn page(first: u64) -> Entry {
    Entry::Leaf(Leaf::new(Output(first), 12, OPEN, Memory::Physical))
}

fn table() -> Entry {
    let raw = 0x5000 | 3;
    Second4::decode(raw, Level(2), &vtd::Caps::FULL)
}

const ABSENT: Entry = Entry::Absent { software: 0 };

/// The changes of the world, what may be stale after each (a device's translations apart), and whether pages name it.
fn changes() -> Vec<(Change, World)> {
    let entry =
        |old, new| Change::Entry { domain: DOMAIN, span: span(0, 0x1000), shifts: [12, 12], old, new };
    let contexts = |old: Option<u16>, new: Option<u16>| {
        let context = |id: Option<u16>, root| id.map(|domain| Context { domain, root: Output(root) });
        Change::Device { old: context(old, 0x1000), new: context(new, 0x2000) }
    };
    let leaf = World::from([Kind::Leaf, Kind::Access]);
    let names = &leaf | &World::from([Kind::Structure]);
    let moved = World::from([Kind::Context, Kind::Access]);
    vec![
        (entry(page(0x1000), ABSENT), leaf),
        (entry(table(), ABSENT), names.clone()),
        (contexts(Some(DOMAIN), None), moved.clone()),
        (contexts(Some(DOMAIN), Some(OTHER_DOMAIN)), moved.clone()),
        (contexts(Some(DOMAIN), Some(DOMAIN)), &moved | &names),
    ]
}

#[test]
fn a_sequence_is_enough_exactly_where_an_adversary_has_nothing_stale_at_its_end() {
    for maker in [Maker::Intel, Maker::Amd, Maker::Arm] {
        let (mut enough, mut compared) = (0, 0);
        let all = sequences(&alphabet(maker), 4);
        for (change, world) in changes() {
            for remote in [Feature::Off, Feature::On] {
                let mut legal = world.clone();
                if remote == Feature::On {
                    legal.insert(Kind::Remote);
                }
                let about = match change {
                    Change::Entry { .. } => About::Page,
                    Change::Device { .. } => About::Everything,
                };
                for commands in &all {
                    let wins = adversary_wins(&legal, about, commands);
                    let found = check(&change, &unit(maker), &device(remote), commands, LEAST);
                    let case = format!("{maker:?} {change:?} {remote:?} {commands:?}: {found:?}");
                    assert!(found.is_err() || !wins, "{case}");
                    // Where a later rank is followed by an earlier one, less is counted on than promised.
                    let windows = commands.split(|command| dropped(command, about).is_none());
                    let falls = windows.into_iter().any(|window| !window.is_sorted_by_key(class));
                    if maker != Maker::Intel || !falls {
                        assert_eq!(found.is_err(), wins, "{case}");
                        compared += 1;
                    }
                    enough += u32::from(found.is_ok());
                }
            }
        }
        assert!(enough > 20 && compared > 10_000, "{maker:?}: {enough} of {compared}");
    }
}

#[test]
fn what_is_recommended_is_enough_and_nothing_of_it_can_be_left_out() {
    for maker in [Maker::Intel, Maker::Amd, Maker::Arm] {
        for (change, _) in changes() {
            for remote in [Feature::Off, Feature::On] {
                let (unit, device) = (unit(maker), device(remote));
                let recipe = needed(&change, &unit, &device, LEAST).expect("there are such commands");
                let commands = recipe.as_slice();
                assert_eq!(check(&change, &unit, &device, commands, LEAST), Ok(()));
                assert!(!commands.is_empty());
                for index in 0..commands.len() {
                    let mut fewer = commands.to_vec();
                    let without = fewer.remove(index);
                    let found = check(&change, &unit, &device, &fewer, LEAST);
                    assert!(found.is_err(), "{maker:?} {change:?} {remote:?} without {without:?}");
                }
            }
        }
    }
}

#[test]
fn what_was_absent_needs_commands_only_where_that_is_kept() {
    let entry = Change::Entry {
        domain: DOMAIN,
        span: span(0, 0x1000),
        shifts: [12, 21],
        old: ABSENT,
        new: page(0x1000),
    };
    let attached = Change::Device { old: None, new: Some(Context { domain: DOMAIN, root: Output(0x1000) }) };
    for maker in [Maker::Intel, Maker::Amd, Maker::Arm] {
        for change in [entry, attached] {
            let device = device(Feature::Off);
            assert_eq!(check(&change, &unit(maker), &device, &[], LEAST), Ok(()));
            let caching = Unit { absent: Feature::On, ..unit(maker) };
            assert!(check(&change, &caching, &device, &[], LEAST).is_err());
            let recipe = needed(&change, &caching, &device, LEAST).expect("there are such commands");
            assert_eq!(check(&change, &caching, &device, recipe.as_slice(), LEAST), Ok(()));
            assert_eq!(
                check(&change, &caching, &device, &[], Consequence::LostMark),
                Ok(()),
                "it only faults"
            );
        }
    }
    let caching = Unit { absent: Feature::On, ..unit(Maker::Intel) };
    let recipe = needed(&attached, &caching, &device(Feature::Off), LEAST).expect("there are such commands");
    assert_eq!(recipe.as_slice()[0], Command::Vtd(Vtd::ContextDevice { domain: 0, device: DEVICE }));
}

#[test]
fn a_missing_command_is_named_with_what_it_leaves() {
    let change = changes()[0].0;
    let (unit, device) = (unit(Maker::Intel), device(Feature::On));
    let pages =
        Vtd::IotlbPages { domain: DOMAIN, pages: span(0, 0x1000), depth: Depth::Leaves, drain: Drain::On };
    let given = [pages, Vtd::Wait].map(Command::Vtd);
    let Err(Missing::Command { remains, .. }) = check(&change, &unit, &device, &given, LEAST) else {
        panic!("the device was told")
    };
    assert_eq!((remains.kept.kind, remains.consequence), (Kind::Remote, Consequence::OtherMemory));
    let reason = check(&change, &unit, &device, &[], LEAST).expect_err("nothing was done").to_string();
    let begin =
        "accesses reach memory that is no longer mapped there: Leaf may be kept for in:0x0 to 0xfff; give [";
    assert!(reason.starts_with(begin), "{reason}");
    // The domain's whole table goes, and one page of it is invalidated.
    let wide = Change::Entry {
        domain: DOMAIN,
        span: span(0, 0x4000_0000),
        shifts: [12, 21],
        old: table(),
        new: ABSENT,
    };
    let given = [
        Vtd::IotlbPages { domain: DOMAIN, pages: span(0, 0x20_0000), depth: Depth::All, drain: Drain::On },
        Vtd::DeviceTlb { device: DEVICE, pages: None },
        Vtd::Wait,
    ];
    let Err(Missing::Command { remains, .. }) = check(&wide, &unit, &device, &given.map(Command::Vtd), LEAST)
    else {
        panic!("the rest of it remains")
    };
    assert_eq!(remains.kept.pages.map(Span::first), Some(Input(0x20_0000)), "where the range ends");
    let live = Change::Entry {
        old: page(0x1000),
        new: page(0x2000),
        domain: 1,
        span: span(0, 0x1000),
        shifts: [12, 21],
    };
    let breaks = Unit { breaks: Breaks::Required, ..unit };
    assert_eq!(
        check(&live, &breaks, &device, &given.map(Command::Vtd), LEAST),
        Err(Missing::Break { span: span(0, 0x1000) })
    );
}

/// What a driver gives for each range that the mapper has forgotten.
type Driver = fn(Span) -> Vec<Command>;

/// The changes that nobody has been told of completely, with the commands since; and what was done too early.
struct Watch {
    unit: Unit,
    device: Device,
    pending: RefCell<Vec<(Change, Vec<Command>)>>,
    early: RefCell<Vec<Missing>>,
    /// Tables by address: level and first input of each.
    tables: RefCell<BTreeMap<u64, (u8, u64)>>,
}

struct Watched<'a, F: Format> {
    ram: &'a Ram,
    watch: &'a Watch,
    caps: F::Caps,
}

impl<F: Format> TableMemory for Watched<'_, F> {
    type Error = Outside;

    fn read(&self, at: Output) -> Result<u64, Outside> {
        self.ram.read(at)
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, Outside> {
        let bytes = F::entries(Level(1)) * 8;
        let base = at.0 / bytes * bytes;
        let place = self.watch.tables.borrow().get(&base).copied();
        // What no device can reach yet is in no table that was seen to be named.
        if let Some((level, first)) = place {
            let level = Level(level);
            let input = Input(first + (((at.0 - base) / 8) << F::shift(level)));
            let mut change =
                Change::of::<F>(DOMAIN, input, level, &self.caps, (current, new)).expect("translated");
            if let Change::Entry { span: all, .. } = &mut change
                && F::shift(level) > 21
            {
                *all = span(BLOCK, 1 << 21);
            }
            self.watch.pending.borrow_mut().push((change, Vec::new()));
            let mut names = vec![(new, level, input.0)];
            while let Some((word, level, first)) = names.pop() {
                let Entry::Table(next) = F::decode(word, level, &self.caps) else { continue };
                let below = next.leads_to(level).expect("a level");
                self.watch.tables.borrow_mut().insert(next.at.0, (below.0, first));
                for index in 0..F::entries(below) {
                    names.push((
                        self.ram.get(next.at.0 + index * 8),
                        below,
                        first + (index << F::shift(below)),
                    ));
                }
            }
        }
        self.ram.compare_exchange(at, current, new)
    }
}

struct Queue<'a> {
    watch: &'a Watch,
    driver: Driver,
}

impl Invalidate for Queue<'_> {
    fn invalidate(&mut self, pages: Span) {
        let Watch { unit, device, tables, .. } = self.watch;
        for (change, commands) in self.watch.pending.borrow_mut().iter_mut() {
            commands.extend((self.driver)(pages));
            // Nobody walks a table any more that was named by what the unit has forgotten.
            let done = match check(change, unit, device, commands, LEAST) {
                Err(Missing::Command { remains, .. }) => {
                    matches!(remains.kept.kind, Kind::Remote | Kind::Access)
                }
                found => found.is_ok(),
            };
            if let (true, Change::Entry { old: Entry::Table(table), .. }) = (done, &*change) {
                tables.borrow_mut().remove(&table.at.0);
            }
        }
    }
}

struct Frames<'a> {
    pools: Pools<8>,
    watch: &'a Watch,
}

impl Frames<'_> {
    fn judge(&self) {
        for (change, commands) in self.watch.pending.borrow().iter() {
            // What merely faults is for whoever maps.
            if let Err(missing) =
                check(change, &self.watch.unit, &self.watch.device, commands, Consequence::LostMark)
            {
                self.watch.early.borrow_mut().push(missing);
            }
        }
    }
}

impl TableFrames for Frames<'_> {
    fn left(&self, level: Level) -> usize {
        self.pools.left(level)
    }

    fn take(&mut self, level: Level) -> Option<Output> {
        self.pools.take(level)
    }

    fn give(&mut self, level: Level, frame: Output) {
        self.judge();
        self.pools.give(level, frame);
    }
}

const ROOT: u64 = 0x40_0000;
/// All that is ever mapped.
const BLOCK: u64 = 0x20_0000;

/// Maps, protects, splits, merges and unmaps; answers what was reachable too long.
fn life_of_a_domain<F: Format>(
    (unit, device): (Unit, Device),
    caps: F::Caps,
    memory: Memory,
    driver: Driver,
) -> Vec<Missing> {
    let ram = Ram::new(1 << 40);
    let tables = RefCell::new(BTreeMap::from([(ROOT, (F::LEVELS, 0))]));
    let watch = Watch { unit, device, pending: RefCell::default(), early: RefCell::default(), tables };
    let watched = Watched::<F> { ram: &ram, watch: &watch, caps };
    let mut frames = Frames { pools: common::pools(0x80_0000, 0x1000), watch: &watch };
    let mut queue = Queue { watch: &watch, driver };
    let block = span(BLOCK, 1 << 21);
    {
        let mut mapper = Mapper::<F, _, _, _>::new(Output(ROOT), caps, &watched, &mut frames, &mut queue)
            .expect("aligned");
        let leaf = Leaf { accessed: true, ..Leaf::new(Output(0x4000_0000), 21, OPEN, memory) };
        mapper.map(block, leaf).expect("free");
        mapper.protect(span(0x20_0000, 0x1000), CLOSED).expect("mapped");
        mapper.protect(block, OPEN).expect("mapped");
        mapper.merge(block).expect("mapped");
        mapper.split(block, Level::PAGES).expect("mapped");
        assert_eq!(mapper.unmap(span(0x20_1000, 0x1000)), Ok(1));
        assert_eq!(mapper.unmap(block), Ok(511));
    }
    frames.judge();
    assert_eq!(ram.image(), BTreeMap::new());
    let early = watch.early.take();
    assert!(!watch.pending.borrow().is_empty());
    early
}

fn vtd(commands: impl IntoIterator<Item = Vtd>) -> Vec<Command> {
    commands.into_iter().map(Command::Vtd).collect()
}

const fn vtd_pages(pages: Span, depth: Depth, drain: Drain) -> Vtd {
    Vtd::IotlbPages { domain: DOMAIN, pages, depth, drain }
}

#[test]
fn the_mapper_gives_no_frame_back_before_a_driver_that_does_all_has_waited() {
    let on = device(Feature::On);
    let caps = vtd::Caps { accessed_dirty: Feature::On, ..vtd::Caps::FULL };
    let full: Driver = |pages| {
        vtd([
            vtd_pages(pages, Depth::All, Drain::On),
            Vtd::DeviceTlb { device: DEVICE, pages: Some(pages) },
            Vtd::Wait,
        ])
    };
    let vtd_unit = unit(Maker::Intel);
    assert_eq!(life_of_a_domain::<Second4>((vtd_unit, on), caps, Memory::Snooped, full), []);
    let amd: Driver = |pages| {
        let pages = Some(pages);
        vec![
            Command::AmdVi(AmdVi::Pages { domain: DOMAIN, pages, depth: Depth::All }),
            Command::AmdVi(AmdVi::CompletionWait),
            Command::AmdVi(AmdVi::IotlbPages { device: DEVICE, pages }),
            Command::AmdVi(AmdVi::CompletionWait),
        ]
    };
    let found = life_of_a_domain::<Host<4>>((unit(Maker::Amd), on), amdvi::Caps::FULL, Memory::Snooped, amd);
    assert_eq!(found, []);
    let smmu: Driver = |pages| {
        vec![
            Command::Smmu(Smmu::TlbiS2Ipa { vmid: DOMAIN, pages, depth: Depth::All }),
            Command::Smmu(Smmu::Sync),
            Command::Smmu(Smmu::AtcInv { stream: DEVICE, pages: Some(pages) }),
            Command::Smmu(Smmu::Sync),
        ]
    };
    let memory = Memory::MemAttr(15, Shareability::Inner);
    let breaking = Unit { breaks: Breaks::Required, ..unit(Maker::Arm) };
    assert_eq!(
        life_of_a_domain::<Second<12, 48>>((breaking, on), arm::Caps::FULL, memory, smmu),
        [],
        "no entry is changed while it is live, either"
    );
}

#[test]
fn each_part_that_a_driver_forgets_leaves_something_that_the_mapper_gives_back() {
    let caps = vtd::Caps::FULL;
    let found = |device: Device, driver: Driver| {
        let early = life_of_a_domain::<Second4>((unit(Maker::Intel), device), caps, Memory::Snooped, driver);
        let kinds = early.iter().filter_map(|missing| match missing {
            Missing::Command { remains, .. } => Some(remains.kept.kind),
            _ => None,
        });
        kinds.collect::<BTreeSet<Kind>>()
    };
    let (off, on) = (device(Feature::Off), device(Feature::On));
    let kinds = |kinds: &[Kind]| kinds.iter().copied().collect::<BTreeSet<_>>();
    let nothing: Driver = |_| Vec::new();
    assert_eq!(found(off, nothing), kinds(&[Kind::Structure, Kind::Leaf]));
    let hasty: Driver = |pages| vtd([vtd_pages(pages, Depth::All, Drain::On)]);
    assert_eq!(
        found(off, hasty),
        kinds(&[Kind::Structure, Kind::Leaf]),
        "without a wait it may not have begun"
    );
    let hinted: Driver = |pages| vtd([vtd_pages(pages, Depth::Leaves, Drain::On), Vtd::Wait]);
    assert!(found(off, hinted).contains(&Kind::Structure), "IH is wrong where a table goes");
    let undrained: Driver = |pages| vtd([vtd_pages(pages, Depth::All, Drain::Off), Vtd::Wait]);
    assert_eq!(found(off, undrained), kinds(&[Kind::Access]));
    let local: Driver = |pages| vtd([vtd_pages(pages, Depth::All, Drain::On), Vtd::Wait]);
    assert_eq!(found(off, local), kinds(&[]));
    assert_eq!(found(on, local), kinds(&[Kind::Remote]));
    let reversed: Driver = |pages| {
        vtd([
            Vtd::DeviceTlb { device: DEVICE, pages: Some(pages) },
            Vtd::Wait,
            vtd_pages(pages, Depth::All, Drain::On),
            Vtd::Wait,
        ])
    };
    assert_eq!(found(on, reversed), kinds(&[Kind::Remote]), "the device asked again in between");
}

#[test]
fn each_change_of_the_mapper_needs_the_commands_of_its_row() {
    // The entry before and after, and how deep an invalidation must go; none where none is needed.
    let level = |raw: u64, level: u8| Second4::decode(raw, Level(level), &vtd::Caps::FULL);
    let (small, large) = (level(0x4000_0003, 1), level(0x4000_0083, 2));
    let (read_only, table) = (level(0x4000_0001, 1), level(0x5003, 2));
    let rows: [(&str, u8, Entry, Entry, Option<Depth>); 8] = [
        ("map", 1, ABSENT, small, None),
        ("map below a new table", 2, ABSENT, table, None),
        ("unmap", 1, small, ABSENT, Some(Depth::Leaves)),
        ("unmap a table", 2, table, ABSENT, Some(Depth::All)),
        ("protect", 1, small, read_only, Some(Depth::Leaves)),
        ("split", 2, large, table, Some(Depth::Leaves)),
        ("merge", 2, table, large, Some(Depth::All)),
        ("harvest", 1, level(0x4000_0303, 1), small, Some(Depth::Leaves)),
    ];
    for (name, level, old, new, depth) in rows {
        let span = span(0x20_0000, 1 << Second4::shift(Level(level)));
        let change = Change::Entry { domain: DOMAIN, span, shifts: [12, 21], old, new };
        for maker in [Maker::Intel, Maker::Amd, Maker::Arm] {
            let recipe = needed(&change, &unit(maker), &device(Feature::Off), Consequence::LostMark);
            let recipe = recipe.expect("there are such commands");
            let expected: Vec<Command> = match (depth, maker) {
                (None, _) => vec![],
                (Some(depth), Maker::Intel) => vtd([vtd_pages(span, depth, Drain::On), Vtd::Wait]),
                (Some(depth), Maker::Amd) => {
                    let pages = AmdVi::Pages { domain: DOMAIN, pages: Some(span), depth };
                    vec![Command::AmdVi(pages), Command::AmdVi(AmdVi::CompletionWait)]
                }
                (Some(depth), Maker::Arm) => {
                    let pages = Smmu::TlbiS2Ipa { vmid: DOMAIN, pages: span, depth };
                    vec![Command::Smmu(pages), Command::Smmu(Smmu::Sync)]
                }
            };
            assert_eq!(recipe.as_slice(), expected, "{name}, {maker:?}");
        }
    }
    let more =
        Change::Entry { domain: DOMAIN, span: span(0, 0x1000), shifts: [12, 21], old: read_only, new: small };
    let recipe = needed(&more, &unit(Maker::Intel), &device(Feature::Off), Consequence::LostMark);
    assert!(
        recipe.is_some_and(|recipe| recipe.as_slice().is_empty()),
        "more rights: a needless fault at worst"
    );
}
