//! Fences against an adversary: a processor that walks, at every moment, whatever it may, keeps all of it, and takes what is
//! open in the order that suits it worst. What [`plimsoll_mmu::tlb::check`] says is compared with what it ends up with.
//!
//! The world is small and has everything once: two stages, tables of two levels, pages of 4 KiB and larger leaves of two of
//! them, one entry that changes. Nothing of the checker's reasoning is used here but what a single fence drops.
use plimsoll_mmu::tlb::{
    Architecture, Arm, Breaks, Cached, Change, Consequence, Fence, Kind, Missing, Owner, Regime, RiscV,
    Stage, Stages, Svm, Tag, Through, Vmx, X86, check, needed,
};
use plimsoll_mmu::{Entry, Input, Leaf, Memory, Output, Permissions, Span, Table};
use std::collections::BTreeSet;

const PAGE: u64 = 4096;
const VM: u16 = 1;
const ASID: u16 = 5;
const EPT: Output = Output(0x8000);
/// The guest physical page of the guest's root.
const ROOT: u64 = 0;

/// A subscript.
fn at(number: u64) -> usize {
    usize::try_from(number).expect("small")
}

/// What an entry says here: absent, a table's frame, or the first frame of what is mapped and whether it is global.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Word {
    Absent,
    Table(u64),
    Leaf(u64, bool),
}

/// Tables by the frame they are in, in guest physical pages for the first stage and host frames for the second.
#[derive(Clone, Debug)]
struct World {
    /// Guest tables, by what the guest calls the page: two entries each.
    guest: Vec<[Word; 2]>,
    /// Host tables: frame 0 is the root with four entries, the others have two.
    host: Vec<Vec<Word>>,
    two: bool,
    /// Whether what is absent where a table could be stands where a table will.
    awaits_table: bool,
    /// Whether what is absent will be global.
    awaits_global: bool,
}

impl World {
    /// The guest's root (page 0) leads to a table (page 1), which maps pages 4 and 5, and to a table (page 2), which maps 6
    /// and 7. The host's root leads to four tables, each of which maps two pages, page n to frame 100 + n.
    fn new(two: bool, global: bool) -> Self {
        let pair = |first| [Word::Leaf(first, global), Word::Leaf(first + 1, global)];
        let none = [Word::Absent; 2];
        Self {
            guest: vec![[Word::Table(1), Word::Table(2)], pair(4), pair(6), pair(6), none],
            host: vec![
                (1..5).map(Word::Table).collect(),
                vec![Word::Leaf(100, false), Word::Leaf(101, false)],
                vec![Word::Leaf(102, false), Word::Leaf(103, false)],
                vec![Word::Leaf(104, false), Word::Leaf(105, false)],
                vec![Word::Leaf(106, false), Word::Leaf(107, false)],
                vec![Word::Leaf(204, false), Word::Leaf(205, false)],
                vec![Word::Leaf(200, false), Word::Leaf(201, false)],
            ],
            two,
            awaits_table: true,
            awaits_global: false,
        }
    }
}

/// Something cached: by what, and what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Item {
    through: u8,
    structure: bool,
    global: bool,
    /// The first page of the addresses it translates, and how many: of the first stage, or of the second for its own.
    page: u64,
    pages: u64,
    /// The leaf of the second stage that it depends on: its first guest physical page, and how many.
    behind: (u64, u64),
    says: Word,
}

const FIRST: u8 = 0;
const SECOND: u8 = 1;
const BOTH: u8 = 2;

/// Who may walk, and how.
#[derive(Clone, Copy, Debug)]
struct Setting {
    regime: Regime,
    tag: Tag,
    root: Option<Output>,
}

impl Item {
    fn cached(&self, setting: &Setting) -> Cached {
        let pages = |first: u64, count: u64| Span::new(Input(first * PAGE), count * PAGE);
        let through = [Through::First, Through::Second, Through::Both][usize::from(self.through)];
        Cached {
            through,
            kind: if self.structure { Kind::Structure } else { Kind::Leaf },
            tag: setting.tag,
            root: setting.root,
            global: self.global,
            first: pages(self.page, self.pages).filter(|_| through != Through::Second),
            second: match through {
                Through::First => None,
                Through::Second => pages(self.page, self.pages),
                Through::Both => pages(self.behind.0, self.behind.1),
            },
        }
    }
}

type Items = BTreeSet<Item>;

/// A frame, and the leaf of the second stage that leads there.
type Led = (u64, (u64, u64));

/// Where the second stage may lead a guest physical page: by what is cached, or by the tables.
fn frames(world: &World, items: &mut Items, page: u64, caches_absent: bool) -> Vec<Led> {
    if !world.two {
        return vec![(page, (page, 1))];
    }
    let mut tables: BTreeSet<u64> = BTreeSet::new();
    let region = page / 2;
    let root = Item {
        through: SECOND,
        structure: true,
        global: false,
        page: region * 2,
        pages: 2,
        behind: (0, 0),
        says: Word::Absent,
    };
    match world.host[0][at(region)] {
        Word::Table(table) => {
            items.insert(Item { says: Word::Table(table), ..root });
        }
        leaf @ Word::Leaf(..) => {
            items.insert(Item { structure: false, says: leaf, ..root });
        }
        Word::Absent if caches_absent => {
            items.insert(Item { structure: world.awaits_table, ..root });
        }
        Word::Absent => {}
    }
    for item in
        items.iter().filter(|item| item.through == SECOND && item.structure && item.page == region * 2)
    {
        if let Word::Table(table) = item.says {
            tables.insert(table);
        }
    }
    for table in tables {
        let word = world.host[at(table)][at(page % 2)];
        if word != Word::Absent || caches_absent {
            let leaf = Item { structure: false, page, pages: 1, says: word, ..root };
            items.insert(leaf);
        }
    }
    let serves = |item: &&Item| {
        item.through == SECOND && !item.structure && (item.page..item.page + item.pages).contains(&page)
    };
    let lead = |item: &Item| match item.says {
        Word::Leaf(frame, _) => Some((frame + page - item.page, (item.page, item.pages))),
        _ => None,
    };
    items.iter().filter(serves).filter_map(lead).collect()
}

/// Adds everything that a processor may come to cache.
fn speculate(world: &World, items: &mut Items, setting: &Setting) {
    let absent = setting.regime.architecture == Architecture::RiscV;
    let linear = !(world.two && setting.regime.architecture == Architecture::Intel);
    loop {
        let before = items.len();
        for page in 0..8 {
            frames(world, items, page, absent);
        }
        for region in 0..2 {
            // Tables of this region that are known, by what the guest calls them. A guest's frame is as good as its page:
            // the host moves pages with what is in them.
            for _ in frames(world, items, ROOT, absent) {
                let word = world.guest[0][at(region)];
                enter(world, items, (word, region * 2, 2), linear, absent);
            }
            let tables: Vec<u64> = items
                .iter()
                .filter(|item| item.through != SECOND && item.structure && item.page == region * 2)
                .filter_map(|item| match item.says {
                    Word::Table(table) => Some(table),
                    _ => None,
                })
                .collect();
            for table in tables {
                for slot in 0..2u64 {
                    let word = world.guest[at(table % 100)][at(slot)];
                    enter(world, items, (word, region * 2 + slot, 1), linear, absent);
                }
            }
        }
        // Pages whose guest physical page is cached by itself.
        let linears: Vec<Item> = items.iter().filter(|item| item.through == FIRST).copied().collect();
        for item in linears {
            combine(world, items, item, absent);
        }
        if items.len() == before {
            return;
        }
    }
}

/// Caches an entry of the first stage that was read, by itself and combined with the second stage.
fn enter(
    world: &World,
    items: &mut Items,
    (word, page, pages): (Word, u64, u64),
    linear: bool,
    absent: bool,
) {
    if word == Word::Absent && !absent {
        return;
    }
    let item = Item {
        through: FIRST,
        structure: matches!(word, Word::Table(_)) || word == Word::Absent && pages == 2 && world.awaits_table,
        global: matches!(word, Word::Leaf(_, true)) || word == Word::Absent && world.awaits_global,
        page,
        pages,
        behind: (0, 0),
        says: word,
    };
    if linear {
        items.insert(item);
    }
    combine(world, items, item, absent);
}

fn combine(world: &World, items: &mut Items, item: Item, absent: bool) {
    if !world.two {
        return;
    }
    match item.says {
        Word::Absent => {
            items.insert(Item { through: BOTH, ..item });
        }
        // Where a table is, the guest's name for it kept beside the frame: they are equal modulo 100.
        Word::Table(table) => {
            for (frame, behind) in frames(world, items, table, absent) {
                items.insert(Item { through: BOTH, behind, says: Word::Table(frame), ..item });
            }
        }
        Word::Leaf(first, global) => {
            for offset in 0..item.pages {
                // A piece of a large page goes with all of it.
                for (frame, behind) in frames(world, items, first + offset, absent) {
                    items.insert(Item { through: BOTH, behind, says: Word::Leaf(frame, global), ..item });
                }
            }
        }
    }
}

/// What the adversary still has once the fences are done that is not what the new tables say.
fn adversary(old: &World, new: &World, setting: &Setting, fences: &[Fence]) -> Items {
    let mut start = Items::new();
    speculate(old, &mut start, setting);
    // What the guest's tables say by themselves stays true when the host's change.
    let mut truth = Items::new();
    if old.guest == new.guest {
        truth.extend(start.iter().filter(|item| item.through == FIRST));
    }
    speculate(new, &mut truth, setting);
    let ordered = matches!(setting.regime.architecture, Architecture::Intel | Architecture::Amd);
    let mut ends = Items::new();
    go(&Worlds { old, new, setting }, start, Vec::new(), ordered, fences, &mut ends);
    ends.difference(&truth).copied().collect()
}

struct Worlds<'a> {
    old: &'a World,
    new: &'a World,
    setting: &'a Setting,
}

fn go(
    worlds: &Worlds<'_>,
    mut items: Items,
    open: Vec<Fence>,
    visible: bool,
    fences: &[Fence],
    ends: &mut Items,
) {
    if !visible {
        speculate(worlds.old, &mut items, worlds.setting);
    }
    speculate(worlds.new, &mut items, worlds.setting);
    let all = fences;
    let Some((fence, rest)) = fences.split_first() else {
        ends.extend(items);
        return;
    };
    let closes = matches!(fence, Fence::Arm { fence: Arm::Dsb, .. } | Fence::RiscV(RiscV::SfenceInvalIr));
    let opens = matches!(fence, Fence::Arm { fence: Arm::Dsb, .. } | Fence::RiscV(RiscV::SfenceWInval));
    let waits = matches!(
        fence,
        Fence::Arm { .. }
            | Fence::RiscV(RiscV::SinvalVma { .. } | RiscV::HinvalVvma { .. } | RiscV::HinvalGvma { .. })
    );
    // Any that is open may act now; there is no reason to earlier, or without need.
    for chosen in 0..if waits && !closes { 0 } else { open.len() } {
        let mut open = open.clone();
        let acts = open.remove(chosen);
        go(worlds, dropped(&items, &acts, worlds.setting), open, visible, all, ends);
    }
    if closes && !open.is_empty() {
        return;
    }
    if closes || opens {
        return go(worlds, items, open, visible || opens, rest, ends);
    }
    if waits {
        let mut open = open;
        open.push(*fence);
        return go(worlds, items, open, visible, rest, ends);
    }
    // These order the stores before them themselves.
    go(worlds, dropped(&items, fence, worlds.setting), open, true, rest, ends);
}

fn dropped(items: &Items, fence: &Fence, setting: &Setting) -> Items {
    items.iter().filter(|item| !fence.drops(&item.cached(setting))).copied().collect()
}

/// A change in both languages. What the entry does not say, the adversary chooses: any of the worlds, before and after.
struct Case {
    worlds: Vec<[World; 2]>,
    change: Change,
}

/// What guests may look like to their host: they know the page that is changed as a table or as data, and lead to it from where
/// no range of the fences below is.
fn guests(global: bool) -> [World; 3] {
    let guest = |table: u64, words: [Word; 2]| {
        let mut world = World::new(true, global);
        world.guest[0] = [Word::Table(2), Word::Table(table)];
        world.guest[at(table)] = words;
        world
    };
    let pages = |first, second| [Word::Leaf(first, global), Word::Leaf(second, global)];
    [guest(1, pages(4, 5)), guest(4, pages(6, 7)), guest(3, pages(1, 4))]
}

/// A word as an entry.
fn entry(word: Word, pages: u64) -> Entry {
    match word {
        Word::Absent => Entry::Absent { software: 0 },
        Word::Table(at) => Entry::Table(Table::new(Output(at * PAGE), Permissions::all(), Memory::Physical)),
        Word::Leaf(first, global) => {
            let shift = if pages == 2 { 13 } else { 12 };
            let leaf = Leaf::new(Output(first * PAGE), shift, Permissions::all(), Memory::Physical);
            Entry::Leaf(Leaf { global, ..leaf })
        }
    }
}

/// All changes: of a page's entry and of an upper one, of each stage there is, absent, tables and leaves in all orders.
fn cases(setting: &Setting) -> Vec<Case> {
    let two = setting.regime.stages == Stages::Two;
    let mut cases = Vec::new();
    let mut add = |stage, pages, page, words: (Word, Word), place: &dyn Fn(&mut World, Word)| {
        let worlds: Vec<World> = [false, true]
            .into_iter()
            .flat_map(|global| match stage {
                Stage::First => vec![World::new(two, global)],
                Stage::Second => guests(global).to_vec(),
            })
            .collect();
        let worlds = worlds.iter().map(|world| {
            [words.0, words.1].map(|word| {
                let mut world = world.clone();
                place(&mut world, word);
                world.awaits_table = !matches!(words, (Word::Absent, Word::Leaf(..)));
                world.awaits_global = matches!(words, (Word::Absent, Word::Leaf(_, true)));
                world
            })
        });
        let worlds = worlds.collect();
        let change = Change {
            stage,
            tag: setting.tag,
            root: setting.root.filter(|_| stage == Stage::Second),
            span: Span::new(Input(page * PAGE), pages * PAGE).expect("fits"),
            page_shift: 12,
            table_shift: 13,
            old: entry(words.0, pages),
            new: entry(words.1, pages),
        };
        cases.push(Case { worlds, change });
    };
    let both = |words: [Word; 4]| {
        let pairs = words.into_iter().flat_map(move |old| words.into_iter().map(move |new| (old, new)));
        pairs.filter(|(old, new)| old != new).collect::<Vec<_>>()
    };
    for global in [false, true] {
        let leaf = |first| Word::Leaf(first, global);
        for words in both([Word::Absent, leaf(4), leaf(7), leaf(6)]) {
            add(Stage::First, 1, 0, words, &|world, word| world.guest[1][0] = word);
        }
        for words in both([Word::Absent, Word::Table(1), Word::Table(3), leaf(2)]) {
            add(Stage::First, 2, 0, words, &|world, word| world.guest[0][0] = word);
        }
    }
    if two {
        let leaf = |first| Word::Leaf(first, false);
        for words in both([Word::Absent, leaf(104), leaf(204), leaf(304)]) {
            add(Stage::Second, 1, 4, words, &|world, word| world.host[3][0] = word);
        }
        for words in both([Word::Absent, leaf(101), leaf(201), leaf(301)]) {
            add(Stage::Second, 1, 1, words, &|world, word| world.host[1][1] = word);
        }
        for words in both([Word::Absent, Word::Table(3), Word::Table(5), leaf(304)]) {
            add(Stage::Second, 2, 4, words, &|world, word| world.host[0][2] = word);
        }
        for words in both([Word::Absent, Word::Table(1), Word::Table(6), leaf(300)]) {
            add(Stage::Second, 2, 0, words, &|world, word| world.host[0][0] = word);
        }
    }
    cases
}

fn span(page: u64, pages: u64) -> Span {
    Span::new(Input(page * PAGE), pages * PAGE).expect("fits")
}

/// Ranges: the first page of each stage's changes, all of a large one, and pages of no concern.
fn ranges() -> [Span; 5] {
    [span(0, 1), span(0, 2), span(1, 1), span(4, 2), span(6, 1)]
}

fn alphabet(setting: &Setting) -> Vec<Fence> {
    let by = setting.tag.owner;
    let mut fences = Vec::new();
    match setting.regime.architecture {
        Architecture::Intel | Architecture::Amd => {
            let mut x86 = |fence| fences.push(Fence::X86 { by, fence });
            for pcid in [ASID, ASID + 1] {
                for pages in ranges() {
                    x86(X86::Invlpg { pcid, pages });
                    x86(X86::InvpcidAddress { pcid, pages });
                }
                x86(X86::InvpcidSingle { pcid });
                x86(X86::MovCr3 { pcid });
            }
            [X86::InvpcidAllGlobal, X86::InvpcidAll, X86::MovCr3Keep, X86::MovCr4Pge]
                .into_iter()
                .for_each(x86);
        }
        Architecture::Arm => {
            let mut arm = |fence| fences.push(Fence::Arm { by, fence });
            for asid in [ASID, ASID + 1] {
                for pages in ranges() {
                    arm(Arm::Vae1 { asid, pages });
                    arm(Arm::Vale1 { asid, pages });
                }
                arm(Arm::Aside1 { asid });
            }
            for pages in ranges() {
                arm(Arm::Vaae1 { pages });
                arm(Arm::Vaale1 { pages });
                arm(Arm::Ipas2e1 { pages });
                arm(Arm::Ipas2le1 { pages });
            }
            [Arm::Dsb, Arm::Vmalle1, Arm::Vmalls12e1, Arm::Alle1].into_iter().for_each(arm);
        }
        Architecture::RiscV => {
            let pages = || ranges().into_iter().map(Some).chain([None]);
            for pages in pages() {
                for asid in [None, Some(ASID), Some(ASID + 1)] {
                    fences.push(Fence::RiscV(RiscV::SfenceVma { by, pages, asid }));
                    fences.push(Fence::RiscV(RiscV::HfenceVvma { vmid: VM, pages, asid }));
                }
                for vmid in [None, Some(VM), Some(VM + 1)] {
                    fences.push(Fence::RiscV(RiscV::HfenceGvma { pages, vmid }));
                }
            }
        }
    }
    match setting.regime.architecture {
        Architecture::Intel => {
            for vpid in [VM, VM + 1] {
                fences.extend(ranges().map(|pages| Fence::Vmx(Vmx::InvvpidAddress { vpid, pages })));
                fences.push(Fence::Vmx(Vmx::InvvpidSingle { vpid }));
                fences.push(Fence::Vmx(Vmx::InvvpidSingleKeepGlobal { vpid }));
            }
            fences.extend([EPT, Output(0x9000)].map(|root| Fence::Vmx(Vmx::InveptSingle { root })));
            fences.extend([Vmx::InveptAll, Vmx::InvvpidAll].map(Fence::Vmx));
        }
        Architecture::Amd => {
            for asid in [VM, VM + 1] {
                fences.extend(ranges().map(|pages| Fence::Svm(Svm::Invlpga { asid, pages })));
                fences.push(Fence::Svm(Svm::FlushGuest { asid }));
                fences.push(Fence::Svm(Svm::FlushGuestNonGlobal { asid }));
            }
            fences.push(Fence::Svm(Svm::FlushAll));
        }
        Architecture::Arm | Architecture::RiscV => {}
    }
    fences
}

/// Host and guest, one stage and two, address spaces that fences can name and that they cannot.
fn settings(architecture: Architecture) -> Vec<Setting> {
    let mut settings = Vec::new();
    for (owner, stages) in
        [(Owner::Host, Stages::One), (Owner::Guest(VM), Stages::One), (Owner::Guest(VM), Stages::Two)]
    {
        for space in [Some(ASID), None] {
            let regime = Regime { architecture, stages, breaks: Breaks::Spared };
            let root = (architecture == Architecture::Intel && stages == Stages::Two).then_some(EPT);
            settings.push(Setting { regime, tag: Tag { owner, space }, root });
        }
    }
    settings
}

/// Compares checker and adversary; returns how many sequences were enough.
fn agree(case: &Case, setting: &Setting, fences: &[Fence]) -> u64 {
    // Host-side mappings of an EPT root are known by it; a guest's own changes concern every root.
    let setting = Setting { root: case.change.root, ..*setting };
    let said = check(&case.change, &setting.regime, fences, Consequence::NeedlessFault);
    let mut lefts = case.worlds.iter().map(|[old, new]| adversary(old, new, &setting, fences));
    let left = lefts.find(|left| !left.is_empty()).unwrap_or_default();
    assert_eq!(
        said.is_err(),
        !left.is_empty(),
        "{:?}\nfences {fences:?}\nchecker {said:?}\nleft {left:#?}",
        case.change
    );
    u64::from(said.is_ok())
}

const ALL: [Architecture; 4] =
    [Architecture::Intel, Architecture::Amd, Architecture::Arm, Architecture::RiscV];

#[test]
fn every_change_with_no_fence_and_with_each_one_leaves_what_the_adversary_finds() {
    for architecture in ALL {
        let (mut enough, mut all) = (0, 0);
        for setting in settings(architecture) {
            for case in cases(&setting) {
                enough += agree(&case, &setting, &[]);
                all += 1;
                for fence in alphabet(&setting) {
                    let by = setting.tag.owner;
                    let dsb = Fence::Arm { by, fence: Arm::Dsb };
                    let fenced = [dsb, fence, dsb];
                    let fences = if architecture == Architecture::Arm { &fenced[..] } else { &fenced[1..2] };
                    enough += agree(&case, &setting, fences);
                    all += 1;
                }
            }
        }
        println!("{architecture:?}: {enough} of {all} sequences were enough");
        assert!(enough > 0 && enough < all, "both answers are seen");
    }
}

#[test]
fn what_is_recommended_is_enough_and_nothing_is_recommended_where_nothing_is_stale() {
    for architecture in ALL {
        for setting in settings(architecture) {
            for case in cases(&setting) {
                let least = Consequence::NeedlessFault;
                let recipe = needed(&case.change, &setting.regime, least).expect("one guest can be fenced");
                agree(&case, &setting, recipe.as_slice());
                assert_eq!(check(&case.change, &setting.regime, recipe.as_slice(), least), Ok(()));
                let bare = check(&case.change, &setting.regime, &[], least);
                assert_eq!(bare.is_ok(), recipe.as_slice().is_empty(), "{:?}", case.change);
            }
        }
    }
}

/// Every sequence of up to `longest` of `fences`.
fn sequences(fences: &[Fence], longest: u32, mut each: impl FnMut(&[Fence])) {
    for length in 0..=longest {
        for mut number in 0..fences.len().pow(length) {
            let mut sequence = Vec::new();
            for _ in 0..length {
                sequence.push(fences[number % fences.len()]);
                number /= fences.len();
            }
            each(&sequence);
        }
    }
}

/// Cases of two stages for one architecture.
fn nested(architecture: Architecture) -> Setting {
    let setting = settings(architecture).into_iter().find(|setting| setting.regime.stages == Stages::Two);
    setting.expect("there are two stages")
}

#[test]
fn arm_sequences_need_their_barriers_and_their_order() {
    let setting = nested(Architecture::Arm);
    let by = setting.tag.owner;
    let fences =
        [Arm::Dsb, Arm::Vmalle1, Arm::Ipas2e1 { pages: span(0, 6) }, Arm::Ipas2le1 { pages: span(0, 6) }]
            .map(|fence| Fence::Arm { by, fence });
    let mut enough = 0;
    // Some changes: pages and tables, of each stage.
    for case in cases(&setting).iter().step_by(23) {
        sequences(&fences, 5, |sequence| enough += agree(case, &setting, sequence));
    }
    assert!(enough > 0, "some sequence is enough");
}

#[test]
fn riscv_split_invalidations_count_between_their_fences_only() {
    let setting = nested(Architecture::RiscV);
    let by = setting.tag.owner;
    let fences = [
        RiscV::SfenceWInval,
        RiscV::SfenceInvalIr,
        RiscV::SinvalVma { by, pages: Some(span(0, 2)), asid: None },
        RiscV::HinvalVvma { vmid: VM, pages: None, asid: None },
        RiscV::HinvalGvma { pages: Some(span(0, 6)), vmid: Some(VM) },
    ]
    .map(Fence::RiscV);
    let mut enough = 0;
    for case in cases(&setting).iter().step_by(23) {
        sequences(&fences, 4, |sequence| enough += agree(case, &setting, sequence));
    }
    assert!(enough > 0, "some sequence is enough");
}

#[test]
fn pairs_of_fences_for_hosts_leave_what_the_adversary_finds() {
    for architecture in [Architecture::Intel, Architecture::Amd, Architecture::RiscV] {
        let setting = nested(architecture);
        let fences: Vec<Fence> = alphabet(&setting)
            .into_iter()
            .filter(|fence| matches!(fence, Fence::Vmx(_) | Fence::Svm(_) | Fence::RiscV(_)))
            .step_by(2)
            .collect();
        for case in cases(&setting).iter().step_by(3) {
            sequences(&fences, 2, |sequence| {
                agree(case, &setting, sequence);
            });
        }
    }
}

#[test]
fn a_combined_translation_comes_back_from_the_second_stage_if_it_is_dropped_first() {
    let setting = nested(Architecture::Arm);
    let case = cases(&setting)
        .into_iter()
        .find(|case| case.change.stage == Stage::Second && matches!(case.change.old, Entry::Leaf(_)))
        .expect("there is such a change");
    let arm = |fence| Fence::Arm { by: setting.tag.owner, fence };
    let [dsb, first, second] = [Arm::Dsb, Arm::Vmalle1, Arm::Ipas2e1 { pages: span(0, 8) }].map(arm);
    let said =
        |fences: &[Fence]| check(&case.change, &setting.regime, fences, Consequence::OtherMemory).err();
    assert_eq!(said(&[dsb, second, dsb, first, dsb]), None);
    for wrong in [&[dsb, first, dsb, second, dsb][..], &[dsb, second, first, dsb], &[second, dsb, first, dsb]]
    {
        let Some(Missing::Fence { remains, needed }) = said(wrong) else { panic!("{wrong:?} is not enough") };
        assert_eq!(remains.consequence, Consequence::OtherMemory);
        assert!(needed.is_some_and(|recipe| recipe.as_slice().len() == 5));
    }
}

#[test]
fn a_live_entry_with_another_size_is_refused_where_it_must_be_broken_first() {
    let setting = nested(Architecture::Arm);
    let regime = Regime { breaks: Breaks::Required, ..setting.regime };
    for case in cases(&setting) {
        let live = |entry| matches!(entry, Entry::Leaf(_) | Entry::Table(_));
        let recipe = needed(&case.change, &regime, Consequence::NeedlessFault).expect("there is one");
        let said = check(&case.change, &regime, recipe.as_slice(), Consequence::NeedlessFault);
        let expected = if live(case.change.old) && live(case.change.new) {
            Err(Missing::Break { span: case.change.span })
        } else {
            Ok(())
        };
        assert_eq!(said, expected);
    }
}

#[test]
fn rights_and_marks_matter_by_what_can_be_lived_with() {
    let tag = Tag { owner: Owner::Host, space: Some(ASID) };
    let full = Leaf {
        accessed: true,
        dirty: true,
        ..Leaf::new(Output(0x4000), 12, Permissions::all(), Memory::Physical)
    };
    let read_only = Leaf { permissions: Permissions::all() - Permissions::WRITE, ..full };
    let clean = Leaf { dirty: false, ..full };
    let change = |old, new| Change {
        stage: Stage::First,
        tag,
        root: None,
        span: span(0, 1),
        page_shift: 12,
        table_shift: 21,
        old: Entry::Leaf(old),
        new: Entry::Leaf(new),
    };
    for (old, new, worst) in [
        (full, read_only, Some(Consequence::MoreRights)),
        (read_only, full, Some(Consequence::NeedlessFault)),
        (full, clean, Some(Consequence::LostMark)),
        (clean, full, None),
        (Leaf { global: true, ..full }, full, Some(Consequence::MoreRights)),
        (full, Leaf { global: true, ..full }, None),
        (full, Leaf { key: 3, ..full }, Some(Consequence::MoreRights)),
        (full, Leaf { software: 1 << 9, ..full }, None),
    ] {
        let regime =
            Regime { architecture: Architecture::Intel, stages: Stages::One, breaks: Breaks::Spared };
        for least in [
            Consequence::NeedlessFault,
            Consequence::LostMark,
            Consequence::MoreRights,
            Consequence::OtherMemory,
        ] {
            let said = check(&change(old, new), &regime, &[], least);
            assert_eq!(said.is_err(), worst.is_some_and(|worst| worst >= least), "{old:?} to {new:?}");
        }
    }
}
