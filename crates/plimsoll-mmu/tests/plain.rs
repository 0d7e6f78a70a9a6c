//! Plain words are what [`Format::decode`] says they are, and walks by them end where a walk that decodes each entry ends.
use plimsoll_mmu::format::amdvi::{self, Host};
use plimsoll_mmu::format::arm::{self, Lower, Second, Upper};
use plimsoll_mmu::format::ept::{self, Ept};
use plimsoll_mmu::format::riscv::{self, Sv39, Sv39x4, Sv48, Sv57};
use plimsoll_mmu::format::vtd::{self, Second3, Second4, Second5};
use plimsoll_mmu::format::x86::{self, Long4, Long5, Maker, Npt};
use plimsoll_mmu::format::{Feature, Words};
use plimsoll_mmu::mapper::{Mapping, Translation};
use plimsoll_mmu::nested::Counted;
use plimsoll_mmu::{
    Cache, Entry, Format, Found, GuestPat, Input, Leaf, Level, Malformed, MapError, Mapper, Memory,
    NothingCached, Output, Permissions, Pools, Shareability, Span, Table, TableMemory,
};
use std::cell::Cell;
use std::marker::PhantomData;

/// Memory ends here; what is beyond it cannot be read.
const LIMIT: u64 = 1 << 30;
const WORDS: u64 = 6_000;
const WALKS: u64 = 6_000;
const RANGES: u64 = 600;

/// Numbers that are the same each time, by position (splitmix64).
fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// Tables without end that nobody wrote: each word is what its address comes to. Most are tables and leaves as the format has them, some
/// with a bit turned over, some anything.
struct Hostile<'a, F: Format> {
    caps: F::Caps,
    memories: &'a [Memory],
    format: PhantomData<F>,
}

impl<F: Format> Hostile<'_, F> {
    /// The word that a number comes to, as `level` writes it.
    fn word(&self, level: Level, number: u64) -> u64 {
        let mut state = number;
        let mut next = |below: u64| {
            state = mixed(state);
            state % below
        };
        let mut permissions = Permissions::all();
        for right in [Permissions::WRITE, Permissions::EXECUTE, Permissions::USER, Permissions::READ] {
            permissions.set(right, next(4) != 0);
        }
        let shift = F::shift(level);
        let entry = if level > Level::PAGES && next(10) < 7 {
            let size = level.below().map_or(4096, |below| F::entries(below) << 3);
            let at = Output(next(LIMIT * 17 / 16) / size * size);
            let table = Table::new(at, permissions, F::TABLE_MEMORY);
            Entry::Table(Table { skips: u8::from(next(8) == 0), ..table })
        } else {
            let shift = shift + if next(4) == 0 { u32::try_from(next(8)).expect("below 8") } else { 0 };
            let memory =
                self.memories[usize::try_from(next(self.memories.len() as u64)).expect("one of them")];
            let output = Output(next(1 << 40) >> shift << shift);
            let (accessed, dirty) = (next(2) == 0, next(2) == 0);
            Entry::Leaf(Leaf { accessed, dirty, ..Leaf::new(output, shift, permissions, memory) })
        };
        // What the format has no word for becomes what is most like it.
        let plainer = |entry| match entry {
            Entry::Table(table) => Entry::Table(Table { skips: 0, permissions: Permissions::all(), ..table }),
            Entry::Leaf(leaf) => {
                Entry::Leaf(Leaf::new(leaf.output, F::shift(level), Permissions::all(), leaf.memory))
            }
            other => other,
        };
        let word = F::encode(&entry, level, &self.caps)
            .or_else(|_| F::encode(&plainer(entry), level, &self.caps))
            .unwrap_or_else(|_| mixed(number));
        match next(12) {
            0 => word ^ 1 << next(64),
            1 => word ^ (1 << next(64) | 1 << next(64)),
            2 => mixed(word) | 1,
            _ => word,
        }
    }
}

impl<F: Format> TableMemory for Hostile<'_, F> {
    type Error = Output;

    fn read(&self, at: Output) -> Result<u64, Output> {
        if at.0 >= LIMIT {
            return Err(at);
        }
        // Whose level a table is, is its address's affair as well: mostly right where tables of a level lead to those below.
        let level = Level(u8::try_from(mixed(at.0 >> 12) % u64::from(F::LEVELS)).expect("a level") + 1);
        let level = if at.0 >> 16 == 0 { F::root() } else { level };
        Ok(self.word(level, at.0))
    }

    fn compare_exchange(&self, at: Output, _: u64, _: u64) -> Result<u64, Output> {
        Err(at)
    }
}

/// What a walk comes to, and how many entries it read.
type Ends<T> = (Result<T, MapError<Output>>, u64);

/// Each entry decoded, one after the other.
fn decoding<F: Format>(memory: &Hostile<'_, F>, root: Output, input: Input) -> Ends<Translation> {
    let (mut table, mut level, mut permissions) = (root, F::root(), Permissions::all());
    for reads in 1.. {
        let at = Output(table.0 | F::index(input, level) << 3);
        let raw = match memory.read(at) {
            Ok(raw) => raw,
            Err(error) => return (Err(MapError::Memory { level, at, error }), reads),
        };
        let malformed = |reason| (Err(MapError::Malformed { level, at, reason }), reads);
        match F::decode(raw, level, &memory.caps) {
            Entry::Absent { .. } => return (Ok(Translation::Absent { level, at }), reads),
            Entry::Malformed(reason) => return malformed(reason),
            Entry::Table(next) => {
                let Some(below) = next.leads_to(level) else { return malformed(Malformed::TableAtLastLevel) };
                if !F::passes(input, level, &next) {
                    return (Ok(Translation::Absent { level, at }), reads);
                }
                permissions &= next.permissions;
                (table, level) = (next.at, below);
            }
            Entry::Leaf(leaf) => {
                permissions &= leaf.permissions;
                let output = Output(leaf.base().0 | F::offset(input) & ((1 << leaf.shift) - 1));
                let shift = F::shift(level);
                let input = F::extend(F::offset(input) >> shift << shift);
                let mapping = Mapping { input, level, leaf, permissions };
                return (Ok(Translation::Mapped(output, mapping)), reads);
            }
        }
    }
    unreachable!("each step goes a level down")
}

/// How often words were plain tables and leaves, and walks ended in a translation, an absent entry, and an error.
#[derive(Debug, Default)]
struct Seen {
    words: [u64; 2],
    ends: [u64; 3],
    shown: usize,
}

fn words<F: Format>(hostile: &Hostile<'_, F>, seed: u64, seen: &mut Seen) {
    let caps = &hostile.caps;
    let address = |raw| (raw & F::ADDRESS) << F::ADDRESS_DOWN;
    for level in (1..=F::LEVELS).map(Level) {
        let plain = F::plain(level, caps);
        let (mut tables, mut permissions) = (Words::NONE, Permissions::all());
        for number in 0..WORDS {
            let raw = hostile.word(level, seed.wrapping_add(number << 8));
            let what = format!("{raw:#x} at {level} in {}, {caps:?}", F::NAME);
            let decoded = F::decode(raw, level, caps);
            if plain.table.fits(raw) {
                assert!(!plain.leaf.fits(raw), "both: {what}");
                let Entry::Table(table) = decoded else { panic!("{decoded:?}: {what}") };
                assert_eq!((table.at.0, table.skips), (address(raw), 0), "{what}");
                assert_eq!(F::through(Words::NONE.and(raw)), table.permissions, "{what}");
                // A few at a time, as on a way.
                if number % 4 == 0 {
                    (tables, permissions) = (Words::NONE, Permissions::all());
                }
                (tables, permissions) = (tables.and(raw), permissions & table.permissions);
                assert_eq!(F::through(tables), permissions, "{what}");
                seen.words[0] += 1;
            }
            if plain.leaf.fits(raw) {
                let Entry::Leaf(leaf) = decoded else { panic!("{decoded:?}: {what}") };
                let inside = (1 << F::shift(level)) - 1;
                assert_eq!((leaf.base().0, leaf.shift), (address(raw) & !inside, F::shift(level)), "{what}");
                assert_eq!(F::permits(tables, raw, caps), permissions & leaf.permissions, "{what}");
                seen.words[1] += 1;
            }
        }
    }
}

fn walks<F: Format>(hostile: &Hostile<'_, F>, seed: u64, seen: &mut Seen) {
    let (mut frames, mut caches) = (Pools::<1>::default(), NothingCached);
    let memory = Counted::new(hostile);
    let root = Output(0);
    let mapper = Mapper::<F, _, _, _>::new(root, hostile.caps, &memory, &mut frames, &mut caches)
        .expect("zero is aligned");
    for number in 0..WALKS {
        let input = F::extend(mixed(seed ^ number) & ((1 << F::INPUT_BITS) - 1));
        let (expected, reads) = decoding(hostile, root, input);
        let before = memory.reads();
        assert_eq!(mapper.walk(input), expected, "{input} in {}, {:?}", F::NAME, hostile.caps);
        assert_eq!(memory.reads() - before, reads, "each entry is read once");
        let before = memory.reads();
        let lean = expected.map(|translation| match translation {
            Translation::Mapped(output, Mapping { level, leaf, permissions, .. }) => {
                Some((output, leaf, level, permissions))
            }
            Translation::Absent { .. } => None,
        });
        let found = mapper.translate(input).map(|found| {
            found.map(|Found { output, shift, level, permissions, word }| {
                let Entry::Leaf(leaf) = F::decode(word, level, &hostile.caps) else {
                    panic!("{word:#x} is no leaf")
                };
                assert_eq!(shift, leaf.shift);
                (output, leaf, level, permissions)
            })
        });
        assert_eq!(found, lean, "{input} in {}, {:?}", F::NAME, hostile.caps);
        assert_eq!(memory.reads() - before, reads, "each entry is read once");
        seen.ends[match lean {
            Ok(Some(_)) => 0,
            Ok(None) => 1,
            Err(_) => 2,
        }] += 1;
    }
}

/// What a range shows, and how it ends, is what its pages come to one after the other.
fn ranges<F: Format>(hostile: &Hostile<'_, F>, seed: u64, seen: &mut Seen) {
    let (mut frames, mut caches) = (Pools::<1>::default(), NothingCached);
    let memory = Counted::new(hostile);
    let root = Output(0);
    let mapper = Mapper::<F, _, _, _>::new(root, hostile.caps, &memory, &mut frames, &mut caches)
        .expect("zero is aligned");
    for number in 0..RANGES {
        let pages = 1 + mixed(seed ^ !number) % 40;
        let first = mixed(seed ^ number) & ((1 << F::INPUT_BITS) - 1);
        let first = F::extend(first >> F::PAGE_SHIFT << F::PAGE_SHIFT);
        let span = Span::new(first, pages << F::PAGE_SHIFT).filter(|span| F::accepts_span(*span));
        let Some(span) = span else { continue };
        let mut expected = Vec::new();
        let ended = (0..pages).try_for_each(|page| {
            let input = Input(first.0 + (page << F::PAGE_SHIFT));
            if let Translation::Mapped(_, mapping) = decoding(hostile, root, input).0? {
                expected.push((mapping.input, mapping.leaf, mapping.level, mapping.permissions));
            }
            Ok(())
        });
        // A leaf of many pages is shown once.
        expected.dedup();
        let before = memory.reads();
        let mut shown = Vec::new();
        let walked = mapper.translate_range(span, |input, found| {
            let Entry::Leaf(leaf) = F::decode(found.word, found.level, &hostile.caps) else {
                panic!("{:#x} is no leaf", found.word)
            };
            assert_eq!(found.shift, leaf.shift);
            let inside = F::offset(input) & ((1 << leaf.shift) - 1);
            assert_eq!(found.output, Output(leaf.base().0 | inside));
            shown.push((input, leaf, found.level, found.permissions));
        });
        assert_eq!((walked, &shown), (ended, &expected), "{span} in {}, {:?}", F::NAME, hostile.caps);
        // One way down, and then a table of each level at most that the range reaches into.
        assert!(memory.reads() - before <= pages + 2 * u64::from(F::LEVELS));
        seen.shown += shown.len();
    }
}

/// Words that are others each time they are read.
struct Changing<'a, F: Format>(Hostile<'a, F>, Cell<u64>);

impl<F: Format> TableMemory for Changing<'_, F> {
    type Error = Output;

    fn read(&self, at: Output) -> Result<u64, Output> {
        let Self(hostile, reads) = self;
        reads.set(reads.get() + 1);
        // Where memory ends is the same each time.
        hostile
            .read(at)
            .map(|word| hostile.read(Output((mixed(word ^ reads.get()) % LIMIT) & !7)).unwrap_or(word))
    }

    fn compare_exchange(&self, at: Output, _: u64, _: u64) -> Result<u64, Output> {
        Err(at)
    }
}

/// Whatever tables become while they are walked, a walk reads an entry a level, a range an entry of each it has, and both end.
fn changing<F: Format>(caps: F::Caps, memories: &[Memory]) {
    let memory = Changing(Hostile::<F> { caps, memories, format: PhantomData }, Cell::new(0));
    let (mut frames, mut caches) = (Pools::<1>::default(), NothingCached);
    let mapper = Mapper::<F, _, _, _>::new(Output(0), caps, &memory, &mut frames, &mut caches)
        .expect("zero is aligned");
    let mut shown = 0;
    for number in 0..WALKS {
        let input = F::extend(mixed(number) & ((1 << (F::INPUT_BITS - 1)) - 1) >> 21 << 21);
        let before = memory.1.get();
        let _ = mapper.translate(input);
        assert!(memory.1.get() - before <= u64::from(F::LEVELS));
        let before = memory.1.get();
        let span = Span::new(input, 16 << F::PAGE_SHIFT).expect("fits");
        let _ = mapper.translate_range(span, |_, found| {
            assert!(matches!(F::decode(found.word, found.level, &caps), Entry::Leaf(_)));
            shown += 1;
        });
        assert!(memory.1.get() - before <= 16 + 2 * u64::from(F::LEVELS));
    }
    assert!(shown > 100, "{shown} of {}", F::NAME);
}

#[test]
fn tables_that_change_while_they_are_walked_lead_somewhere_or_nowhere_and_to_an_end() {
    changing::<Long4>(x86::Caps::FULL, &[Memory::Pat(0)]);
    changing::<Ept>(ept::Caps::FULL, &[Memory::Ept(Cache::WriteBack, GuestPat::Combined)]);
    changing::<Lower<12, 48>>(arm::Caps::FULL, &[Memory::Mair(1, Shareability::Inner)]);
    changing::<Sv39>(riscv::Caps::FULL, &[Memory::Physical]);
    changing::<Host<4>>(amdvi::Caps::FULL, &[Memory::Physical]);
}

/// One format on processors that have more and less.
fn agree<F: Format>(memories: &[Memory], caps: &[F::Caps]) {
    let mut seen = Seen::default();
    for (number, caps) in (1..).zip(caps) {
        let hostile = Hostile::<F> { caps: *caps, memories, format: PhantomData };
        words(&hostile, mixed(number), &mut seen);
        walks(&hostile, mixed(!number), &mut seen);
        ranges(&hostile, mixed(number << 32), &mut seen);
    }
    let Seen { words: [tables, leaves], ends, shown } = seen;
    assert!(shown > 0, "no range of {} shows anything", F::NAME);
    // One level has no tables.
    assert!((tables > 0 || F::LEVELS == 1) && leaves > 0, "nothing is plain in {}: {seen:?}", F::NAME);
    assert!(ends.iter().all(|count| *count > 0), "{} walks that end alike: {seen:?}", F::NAME);
}

const ON_OFF: [Feature; 2] = [Feature::On, Feature::Off];

#[test]
fn x86_64_and_nested_tables() {
    let mut caps = Vec::new();
    for (physical_bits, gib_pages) in [(52, Feature::On), (40, Feature::Off), (33, Feature::On)] {
        for (no_execute, keys) in ON_OFF.into_iter().zip(ON_OFF) {
            for maker in [Maker::Intel, Maker::Amd] {
                caps.push(x86::Caps { physical_bits, gib_pages, no_execute, keys, maker });
            }
        }
    }
    let memories: Vec<_> = (0..8).map(Memory::Pat).collect();
    agree::<Long4>(&memories, &caps);
    agree::<Long5>(&memories, &caps);
    agree::<Npt>(&memories, &caps);
}

#[test]
fn extended_page_tables() {
    let mut caps = Vec::new();
    for (physical_bits, largest_leaf) in [(52, 3), (40, 2), (33, 1)] {
        for (execute_only, accessed_dirty) in ON_OFF.into_iter().zip(ON_OFF) {
            let largest_leaf = Level(largest_leaf);
            caps.push(ept::Caps { physical_bits, execute_only, largest_leaf, accessed_dirty });
        }
    }
    let types = [Cache::WriteBack, Cache::WriteBack, Cache::Uncacheable, Cache::WriteProtected];
    let memories: Vec<_> = types
        .iter()
        .flat_map(|cache| [GuestPat::Combined, GuestPat::Ignored].map(|pat| Memory::Ept(*cache, pat)))
        .collect();
    agree::<Ept>(&memories, &caps);
}

#[test]
fn arm() {
    let mut caps = Vec::new();
    for physical_bits in [48, 40, 33] {
        for (dirty_management, separate_execute) in ON_OFF.into_iter().zip(ON_OFF) {
            let direct_resize = Feature::Off;
            caps.push(arm::Caps { physical_bits, dirty_management, separate_execute, direct_resize });
        }
    }
    let first = [Memory::Mair(1, Shareability::Inner), Memory::Mair(7, Shareability::Non)];
    let second = [Memory::MemAttr(15, Shareability::Inner), Memory::MemAttr(0, Shareability::Outer)];
    agree::<Lower<12, 48>>(&first, &caps);
    agree::<Upper<14, 47>>(&first, &caps);
    agree::<Lower<16, 42>>(&first, &caps);
    // A root with fewer entries than a contiguous hint joins.
    agree::<Lower<12, 32>>(&first, &caps);
    agree::<Second<12, 40>>(&second, &caps);
    agree::<Second<16, 48>>(&second, &caps);
}

#[test]
fn riscv() {
    let caps: Vec<_> = ON_OFF
        .into_iter()
        .flat_map(|napot| ON_OFF.map(|memory_types| riscv::Caps { napot, memory_types }))
        .collect();
    let memories = [Memory::Physical, Memory::Physical, Memory::NonCacheable, Memory::Io];
    agree::<Sv39>(&memories, &caps);
    agree::<Sv48>(&memories, &caps);
    agree::<Sv57>(&memories, &caps);
    agree::<Sv39x4>(&memories, &caps);
}

#[test]
fn remapping_hardware() {
    let mut caps = Vec::new();
    for (physical_bits, largest) in [(52, 3), (40, 2), (33, 1)] {
        for (snoop_control, transient) in ON_OFF.into_iter().zip(ON_OFF) {
            let (largest_leaf, accessed_dirty) = (Level(largest), snoop_control);
            let whole = vtd::Caps { physical_bits, largest_leaf, snoop_control, ..vtd::Caps::FULL };
            caps.push(vtd::Caps { transient, accessed_dirty, ..whole });
        }
    }
    let memories = [Memory::Physical, Memory::Snooped];
    agree::<Second3>(&memories, &caps);
    agree::<Second4>(&memories, &caps);
    agree::<Second5>(&memories, &caps);
    let keeps = [amdvi::Keeps::Nothing, amdvi::Keeps::Accessed, amdvi::Keeps::AccessedAndDirty];
    let caps: Vec<_> = keeps
        .into_iter()
        .flat_map(|keeps| [52, 40, 33].map(|physical_bits| amdvi::Caps { physical_bits, keeps }))
        .collect();
    agree::<Host<2>>(&memories, &caps);
    agree::<Host<4>>(&memories, &caps);
    agree::<Host<5>>(&memories, &caps);
}
