//! Random guests with x86-64's own tables: calls that are cut short, words that are garbage, and one book that is kept all along.
use crate::common::{Ram, random};
use plimsoll_mmu::direct::{Direct, Frame, Kind, Marks, Refused, Update};
use plimsoll_mmu::format::x86::{Caps, Long4};
use plimsoll_mmu::{Entry, Format, Level, Output, Permissions};
use plimsoll_types::MachineId;
use std::collections::BTreeSet;

const FIRST: u64 = 0x10_0000;
const FRAMES: usize = 12;
const GUEST: MachineId = MachineId(0);
const OTHER: MachineId = MachineId(1);
/// All other entries stay absent.
const INDICES: [u64; 4] = [0, 1, 2, 511];

/// A table of a level, or a page that may be written or not, as a processor has cached it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cached {
    Table(u8, usize),
    Page(usize, bool),
}

const fn address(frame: usize) -> Output {
    Output(FIRST + 0x1000 * frame as u64)
}

fn number(at: Output) -> Option<usize> {
    (0..FRAMES).find(|frame| address(*frame) == at)
}

fn decode(ram: &Ram, frame: usize, index: u64, level: Level) -> Entry {
    Long4::decode(ram.get(address(frame).0 | index << 3), level, &Caps::FULL)
}

/// Everything that a processor with this root can have cached by now.
fn cache(ram: &Ram, root: Option<usize>, cached: &mut BTreeSet<Cached>) {
    let mut todo: Vec<Cached> = std::mem::take(cached).into_iter().collect();
    todo.extend(root.map(|root| Cached::Table(4, root)));
    while let Some(next) = todo.pop() {
        let Cached::Table(level, frame) = next else {
            cached.insert(next);
            continue;
        };
        if !cached.insert(next) {
            continue;
        }
        for index in INDICES {
            match decode(ram, frame, index, Level(level)) {
                Entry::Table(table) => {
                    let below = number(table.at).unwrap_or_else(|| panic!("{table:?} is reached"));
                    todo.push(Cached::Table(level - 1, below));
                }
                Entry::Leaf(leaf) => {
                    let page = number(leaf.output).unwrap_or_else(|| panic!("{leaf:?} is reached"));
                    assert_eq!(
                        leaf.memory,
                        Long4::TABLE_MEMORY,
                        "what is written past the caches is not checked"
                    );
                    todo.push(Cached::Page(page, leaf.permissions.contains(Permissions::WRITE)));
                }
                _ => {}
            }
        }
    }
}

/// Uses and needs of each frame, counted anew.
fn counted(direct: &Direct<'_, Long4, Ram>, ram: &Ram, root: Option<usize>) -> Vec<(u32, u32)> {
    let mut counts = vec![(0, 0); FRAMES];
    let mut count = |frame: Option<usize>, needs: bool| {
        let place = &mut counts[frame.expect("what is held is a frame")];
        *place = (place.0 + 1, place.1 + u32::from(needs));
    };
    if root.is_some() {
        count(root, true);
    }
    for frame in 0..FRAMES {
        let record = direct.frame(address(frame)).expect("there");
        if record.pinned() {
            count(Some(frame), true);
        }
        let Kind::Table(level) = record.kind() else { continue };
        for index in INDICES.into_iter().filter(|index| *index < u64::from(record.held())) {
            match decode(ram, frame, index, level) {
                Entry::Table(table) => count(number(table.at), true),
                Entry::Leaf(leaf) => {
                    count(number(leaf.output), leaf.permissions.contains(Permissions::WRITE))
                }
                _ => {}
            }
        }
    }
    counts
}

/// How often something happened.
#[derive(Debug, Default)]
struct Seen {
    loaded: u32,
    written: u32,
    updated: u32,
    fences: u32,
    budgets: u32,
    works: u32,
    released: u32,
}

/// What a guest is loaded with that could run, and that may never come to it.
fn prepare(ram: &Ram) {
    for level in 1..4 {
        ram.set(address(level - 1).0, address(level).0 | 7);
    }
    for (page, flags) in [(4, 7), (3, 5), (5, 7)] {
        ram.set(address(3).0 | (page - 3) << 3, address(usize::try_from(page).expect("small")).0 | flags);
    }
}

fn run(seed: u64, seen: &mut Seen) {
    let mut next = random(seed);
    let ram = Ram::new(1 << 40);
    let (mut frames, mut fences, mut roots) = (vec![Frame::FREE; FRAMES], [0; 2], [None; 1]);
    let books = (Output(FIRST), &mut frames[..]);
    let mut direct = Direct::<Long4, _>::new(&ram, Caps::FULL, books, &mut fences, &mut roots);
    for frame in 0..FRAMES {
        direct.give(GUEST, address(frame)).expect("free");
    }
    prepare(&ram);
    let (mut cached, mut root) = (BTreeSet::new(), None);
    for step in 0..120 {
        let frame = usize::try_from(next() % FRAMES as u64).expect("small");
        let entry = Output(address(frame).0 | INDICES[usize::try_from(next() & 3).expect("small")] << 3);
        let flags = [0, 1, 3, 5, 7, 7, 7, 0x27, 0x67, 0x87, 0x107, 0x1f, 1 << 63 | 7];
        let flags = flags[usize::try_from(next() % 13).expect("small")];
        let target = address(usize::try_from(next() % (FRAMES as u64 + 1)).expect("small")).0;
        let word = if next().is_multiple_of(16) { next() } else { target | flags };
        let level = Level(u8::try_from(next() % 6).expect("small"));
        let mut budget = next() % 2500;
        let writable: Vec<_> = cached.iter().filter(|it| matches!(it, Cached::Page(_, true))).collect();
        let answer = match next() % 16 {
            0..2 => direct.pin(GUEST, address(frame), level, &mut budget),
            2 => direct.unpin(GUEST, address(frame)),
            3 | 4 => {
                let frame = if next().is_multiple_of(2) { 0 } else { frame };
                let loaded = direct.load(0, GUEST, address(frame), &mut budget);
                if loaded.is_ok() {
                    root = Some(frame);
                    seen.loaded += 1;
                }
                loaded.map(|_| ())
            }
            5 if next().is_multiple_of(4) => {
                direct.unload(0);
                root = None;
                Ok(())
            }
            6..11 => {
                let marks = if next().is_multiple_of(2) { Marks::Keep } else { Marks::Replace };
                let (done, answer) =
                    direct.update_all(GUEST, &[Update { at: entry, word, marks }], &mut budget);
                seen.updated += u32::from(done == 1);
                answer
            }
            11 | 12 if !writable.is_empty() => {
                let chosen = usize::try_from(next() % writable.len() as u64).expect("small");
                if let Cached::Page(page, _) = writable[chosen] {
                    ram.set(address(*page).0 | entry.0 & 0xfff, word);
                    seen.written += 1;
                }
                Ok(())
            }
            13 => direct.work(&mut budget).map(|_| ()),
            14 => {
                let released = direct.release(GUEST, address(frame));
                seen.released += u32::from(released.is_ok());
                released
            }
            _ => direct.give(if next().is_multiple_of(2) { GUEST } else { OTHER }, address(frame)),
        };
        match answer {
            Err(Refused::Fence(_)) => {
                seen.fences += 1;
                cached.clear();
                direct.fenced(GUEST);
            }
            Err(Refused::Budget) => seen.budgets += 1,
            Err(Refused::Work(_)) => seen.works += 1,
            _ => {}
        }
        cache(&ram, root, &mut cached);
        let what = format!("seed {seed}, step {step}");
        for it in &cached {
            let (Cached::Table(_, frame) | Cached::Page(frame, _)) = *it;
            let record = direct.frame(address(frame)).expect("there");
            assert_eq!(record.owner(), Some(GUEST), "{what}: {it:?}");
            let table = matches!(record.kind(), Kind::Table(_)) && (record.needed() > 0 || record.held() > 0);
            match *it {
                Cached::Table(level, _) => {
                    assert_eq!(record.kind(), Kind::Table(Level(level)), "{what}: {it:?}")
                }
                Cached::Page(_, writable) => assert!(!(writable && table), "{what}: {it:?} of {record:?}"),
            }
        }
        let records = (0..FRAMES).filter_map(|frame| direct.frame(address(frame)));
        let counts: Vec<_> = records.map(|record| (record.uses(), record.needed())).collect();
        assert_eq!(counts, counted(&direct, &ram, root), "{what}");
    }
}

#[test]
fn random_guests_never_write_a_table_nor_reach_what_is_not_theirs() {
    let mut seen = Seen::default();
    for seed in 1..=3000 {
        run(seed, &mut seen);
    }
    println!("{seen:?}");
    let Seen { loaded, written, updated, fences, budgets, works, released } = seen;
    for count in [loaded, written, updated, fences, budgets, works, released] {
        assert!(count > 100, "some of it is hardly tested");
    }
}
