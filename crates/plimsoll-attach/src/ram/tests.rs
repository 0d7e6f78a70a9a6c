//! Guest RAM is found in what real VMMs have mapped (`fixtures`: smaps of QEMU 7.2, mappings of at least 1 MiB) and in
//! mappings laid out as the other VMMs' sources say.

use super::*;
use plimsoll_sys::procfs::maps::parse_smaps;
use proptest::prelude::{any, prop, proptest};

const QEMU: Layout = Layout { mark: VmFlags::DONT_FORK, cuts: &[] };
const RUST_VMM: Layout = Layout { mark: VmFlags::NO_RESERVE, cuts: &[ByteCount(3 << 30)] };

const PLAIN: &str = include_str!("fixtures/qemu-7.2-plain.smaps");
const NODES: &str = include_str!("fixtures/qemu-7.2-numa.smaps");
const EQUAL_NODES: &str = include_str!("fixtures/qemu-7.2-equal-nodes.smaps");
const MEM_PATH: &str = include_str!("fixtures/qemu-7.2-mem-path.smaps");
const MEM_LOCK: &str = include_str!("fixtures/qemu-7.2-mem-lock.smaps");

fn block(name: &str, mib: u64, backing: Backing) -> Block {
    Block { size: Some(ByteCount::mib(mib)), backing, ..Block::unsaid(name) }
}

fn kind_of(mapping: &Mapping) -> FileKind {
    if mapping.path.starts_with("/memfd:") { FileKind::Memory } else { FileKind::Disk }
}

fn locate(text: &str, layout: Layout, blocks: &[Block]) -> Result<Located, RamError> {
    let mappings = parse_smaps(text).unwrap();
    Finder::new(&mappings, layout, &kind_of).locate(blocks)
}

fn shown(located: &Located) -> Vec<String> {
    located
        .ranges
        .iter()
        .map(|range| format!("{} {} {}", range.block, show(range.hva), range.backing))
        .collect()
}

/// Mappings of those sizes in MiB, one after the other, with flags: `_` is a hole.
fn laid_out(pieces: &[(&str, u64, &str)]) -> String {
    let mut text = String::new();
    let mut at: u64 = 0x7f00_0000_0000;
    for (kind, mib, flags) in pieces {
        let end = at + (mib << 20);
        let line = match *kind {
            "_" => String::new(),
            "anon" => format!(
                "{at:x}-{end:x} rw-p 00000000 00:00 0\nRss: 4 kB\nSwap: 8 kB\nVmFlags: rd wr {flags}\n"
            ),
            "none" => format!("{at:x}-{end:x} ---p 00000000 00:00 0\nVmFlags: {flags}\n"),
            file => format!("{at:x}-{end:x} {file}\nVmFlags: rd wr {flags}\n"),
        };
        text.push_str(&line);
        at = end;
    }
    text
}

#[test]
fn the_ram_of_a_plain_qemu_is_found() {
    let found = locate(PLAIN, QEMU, &[block("ram", 64, Backing::Anonymous)]).unwrap();
    assert_eq!(shown(&found), ["ram 0x7fa75be00000-0x7fa75fe00000 private anonymous memory"]);
    assert!(found.ranges[0].hazards.is_empty() && found.notes.is_empty());
}

#[test]
fn nodes_of_equal_size_are_told_apart_by_their_backing() {
    let blocks = [block("node0", 64, Backing::Anonymous), block("node1", 64, Backing::Memfd)];
    let found = locate(NODES, QEMU, &blocks).unwrap();
    assert_eq!(
        shown(&found),
        [
            "node0 0x7f0493e00000-0x7f0497e00000 private anonymous memory",
            "node1 0x7f048fdff000-0x7f0493dff000 shared memory /memfd:memory-backend-memfd (deleted)",
        ]
    );
    assert_eq!(found.ranges[1].hazards, [Hazard::SharedPages]);
    assert!(found.notes.is_empty());
}

#[test]
fn nodes_that_differ_in_nothing_are_found_and_said_to_be_interchangeable() {
    let mut blocks = [block("node0", 64, Backing::Anonymous), block("node1", 64, Backing::Anonymous)];
    let found = locate(EQUAL_NODES, QEMU, &blocks).unwrap();
    assert_eq!(found.ranges.len(), 2);
    assert!(found.ranges[0].hva.start() > found.ranges[1].hva.start(), "QEMU maps downwards");
    assert_eq!(found.notes, [Note::Interchangeable { names: "node0, node1".to_owned() }]);
    // A QEMU that tells addresses settles it.
    (blocks[0].at, blocks[1].at) = (Some(found.ranges[1].hva.start()), Some(found.ranges[0].hva.start()));
    let told = locate(EQUAL_NODES, QEMU, &blocks).unwrap();
    assert_eq!((told.ranges[0].hva, told.notes.len()), (found.ranges[1].hva, 0));
}

#[test]
fn a_removed_file_below_mem_path_is_ram() {
    let found = locate(MEM_PATH, QEMU, &[block("ram", 64, Backing::File("/tmp/at".into()))]).unwrap();
    assert!(
        matches!(&found.ranges[0].backing, RamBacking::PrivateFile { path } if path.starts_with("/tmp/at/qemu_back_mem"))
    );
    let elsewhere = [block("ram", 64, Backing::File("/dev/hugepages".into()))];
    assert!(matches!(locate(MEM_PATH, QEMU, &elsewhere), Err(RamError::NotFound { .. })));
}

#[test]
fn locked_ram_is_noticed() {
    let found = locate(MEM_LOCK, QEMU, &[block("ram", 64, Backing::Anonymous)]).unwrap();
    assert_eq!(found.ranges[0].hazards, [Hazard::Locked { locked: ByteCount::mib(64) }]);
    assert_eq!(found.ranges[0].resident, ByteCount::mib(64));
}

#[test]
fn the_mark_tells_ram_from_an_arena_of_its_size() {
    let text = laid_out(&[("anon", 64, "ac"), ("_", 2, ""), ("anon", 64, "dc mg"), ("none", 1, "")]);
    let found = locate(&text, QEMU, &[block("ram", 64, Backing::Anonymous)]).unwrap();
    assert_eq!(found.ranges[0].hva.start(), Hva(0x7f00_0420_0000));
}

#[test]
fn two_places_that_fit_are_ambiguous_and_both_are_named() {
    let text = laid_out(&[("anon", 64, ""), ("_", 2, ""), ("anon", 64, "")]);
    let error = locate(&text, QEMU, &[block("ram", 64, Backing::Anonymous)]).err().unwrap().to_string();
    assert_eq!(
        error,
        "guest RAM is ambiguous: ram of 64M could be any of 0x7f0004200000-0x7f0008200000, \
         0x7f0000000000-0x7f0004000000: name the right one with --range"
    );
}

#[test]
fn places_that_share_addresses_are_not_two_blocks() {
    let text = laid_out(&[("anon", 32, ""), ("anon", 32, "hg"), ("anon", 32, "")]);
    let blocks = [block("a", 64, Backing::Anonymous), block("b", 64, Backing::Anonymous)];
    assert!(matches!(locate(&text, QEMU, &blocks), Err(RamError::Ambiguous { .. })));
}

#[test]
fn a_mapping_cut_by_advice_counts_as_one() {
    let text = laid_out(&[
        ("none", 1, ""),
        ("anon", 16, "dc"),
        ("anon", 32, "dc hg lo"),
        ("anon", 16, "dc nh"),
        ("none", 1, ""),
    ]);
    let found = locate(&text, QEMU, &[block("ram", 64, Backing::Anonymous)]).unwrap();
    let range = &found.ranges[0];
    assert_eq!(range.hva.len(), ByteCount::mib(64));
    assert_eq!((range.resident, range.swapped), (ByteCount(12 << 10), ByteCount(24 << 10)));
    assert_eq!(range.hazards, [Hazard::Locked { locked: ByteCount::mib(32) }]);
}

#[test]
fn what_is_not_there_is_said_with_what_is() {
    let text =
        laid_out(&[("anon", 48, ""), ("_", 1, ""), ("rw-s 00000000 00:01 9 /memfd:x (deleted)", 2, "")]);
    let error = locate(&text, QEMU, &[block("ram", 64, Backing::Anonymous)]).err().unwrap().to_string();
    assert_eq!(
        error,
        "guest RAM was not found: looked for ram of 64M, and the largest mappings that can be written are \
         0x7f0000000000-0x7f0003000000 of 48M, 0x7f0003100000-0x7f0003300000 of 2M /memfd:x (deleted): if one of them \
         is it, name it with --range"
    );
}

#[test]
fn ram_cut_at_the_hole_below_4_gib_is_found_in_one_piece_and_in_two() {
    let wanted = [block("mem0", 5120, Backing::Unsaid)];
    for pieces in [
        vec![("anon", 5120, "nr")],
        vec![("anon", 2048, "nr"), ("anon", 3072, "nr")],
        vec![("anon", 2048, "nr"), ("_", 1, ""), ("anon", 3072, "nr")],
    ] {
        let found = locate(&laid_out(&pieces), RUST_VMM, &wanted).unwrap();
        assert_eq!(found.ranges.iter().map(|range| range.hva.len()).sum::<ByteCount>(), ByteCount::mib(5120));
        assert!(found.ranges.iter().all(|range| range.block == "mem0"));
    }
    let too_small = laid_out(&[("anon", 2047, "nr"), ("_", 1, ""), ("anon", 3072, "nr")]);
    assert!(locate(&too_small, RUST_VMM, &wanted).is_err());
}

#[test]
fn one_file_in_pieces_is_found_wherever_it_is_cut() {
    let low = "rw-s 00000000 00:01 7 /memfd:crosvm_guest (deleted)";
    let high = "rw-s 40000000 00:01 7 /memfd:crosvm_guest (deleted)";
    let other = "rw-s 00000000 00:01 8 /memfd:other (deleted)";
    let text = laid_out(&[(high, 512, ""), ("_", 1, ""), (other, 64, ""), ("_", 1, ""), (low, 1024, "")]);
    let found = locate(&text, RUST_VMM, &[block("guest", 1536, Backing::Memfd)]).unwrap();
    assert_eq!(found.ranges.len(), 2);
    assert_eq!(
        found.ranges[0].hva.len(),
        ByteCount::mib(1024),
        "the piece at the file's beginning comes first"
    );
    assert!(locate(&text, RUST_VMM, &[block("guest", 1600, Backing::Memfd)]).is_err());
}

#[test]
fn ram_of_unknown_size_is_told_by_its_looks_and_said_to_be() {
    let text =
        laid_out(&[("anon", 512, "nr"), ("_", 1, ""), ("anon", 64, ""), ("_", 1, ""), ("anon", 2, "nr")]);
    let found = locate(&text, RUST_VMM, &[Block::unsaid("dram")]).unwrap();
    assert_eq!(shown(&found), ["dram 0x7f0000000000-0x7f0020000000 private anonymous memory"]);
    assert_eq!(found.notes, [Note::ByLooks]);
    let nothing = laid_out(&[("anon", 64, ""), ("none", 512, "nr")]);
    assert!(matches!(locate(&nothing, RUST_VMM, &[Block::unsaid("dram")]), Err(RamError::NotFound { .. })));
}

#[test]
fn a_snapshots_file_under_ram_is_told_by_its_looks() {
    let text =
        laid_out(&[("rw-p 00000000 fe:00 5 /srv/vm/mem.snap", 256, "nr"), ("_", 1, ""), ("anon", 64, "nr")]);
    let found = locate(&text, RUST_VMM, &[Block::unsaid("dram")]).unwrap();
    assert_eq!(shown(&found), ["dram 0x7f0000000000-0x7f0010000000 private copy of file /srv/vm/mem.snap"]);
}

#[test]
fn a_growing_block_has_all_that_looks_like_ram_if_it_adds_up() {
    let growing =
        |least, most| Block::unsaid("mem0").growing(ByteCount::mib(least), ByteCount::mib(most - least));
    let found = |pieces: &[(&str, u64, &str)], blocks: &[Block]| {
        let found = locate(&laid_out(pieces), RUST_VMM, blocks);
        found.map(|found| found.ranges.iter().map(|range| range.hva.len().0 >> 20).collect::<Vec<_>>())
    };
    let hole = ("_", 1, "");
    // Not grown, grown by two modules, one of them joined with the first piece; slots that are not accessible yet.
    assert_eq!(found(&[("anon", 64, "nr")], &[growing(64, 256)]).unwrap(), [64]);
    assert_eq!(
        found(&[("anon", 96, "nr"), hole, ("anon", 32, "nr")], &[growing(64, 256)]).unwrap(),
        [96, 32]
    );
    let slots = [("anon", 64, "nr"), ("none", 32, "nr"), ("anon", 32, "nr"), ("none", 32, "nr")];
    assert_eq!(found(&slots, &[growing(96, 160)]).unwrap(), [64, 32]);
    // What belongs to another block is not its.
    let blocks = [growing(64, 96), block("zone, virtio-mem", 48, Backing::Unsaid)];
    let pieces = [("anon", 64, "nr"), hole, ("anon", 48, "nr"), hole, ("anon", 32, "nr")];
    assert_eq!(found(&pieces, &blocks).unwrap(), [48, 64, 32]);
    // Too much: the piece that was there from the start is still known by its size. Too little is not.
    assert_eq!(found(&[("anon", 64, "nr"), hole, ("anon", 512, "nr")], &[growing(64, 128)]).unwrap(), [64]);
    assert!(matches!(found(&[("anon", 32, "nr")], &[growing(64, 128)]), Err(RamError::NotFound { .. })));
}

#[test]
fn memory_that_cannot_be_swapped_or_is_watched_is_noticed() {
    let hazards = |kind: &str, flags: &str| {
        let text = laid_out(&[(kind, 64, flags)]);
        locate(&text, RUST_VMM, &[block("ram", 64, Backing::Unsaid)]).unwrap().ranges[0].hazards.clone()
    };
    assert_eq!(hazards("rw-s 00000000 00:0f 5 /anon_hugepage (deleted)", "ht"), [Hazard::HugeTlb]);
    assert_eq!(hazards("anon", "um"), [Hazard::Userfaultfd]);
    assert_eq!(
        hazards("anon", "uw lo"),
        [Hazard::Userfaultfd, Hazard::Locked { locked: ByteCount::mib(64) }]
    );
    assert_eq!(
        hazards("rw-s 00000000 fe:00 5 /srv/ram", ""),
        [Hazard::DiskFile { path: "/srv/ram".to_owned() }]
    );
    assert_eq!(hazards("rw-p 00000000 fe:00 5 /srv/ram", ""), []);
}

#[test]
fn named_ranges_are_checked_against_what_is_mapped() {
    let text =
        laid_out(&[("anon", 64, ""), ("anon", 64, "hg"), ("_", 2, ""), ("none", 64, ""), ("anon", 8, "io")]);
    let mappings = parse_smaps(&text).unwrap();
    let finder = Finder::new(&mappings, QEMU, &kind_of);
    let verify = |ranges: &[&str]| {
        let ranges: Vec<HvaRange> = ranges.iter().map(|text| parse_range(text).unwrap()).collect();
        finder.verify(&ranges).map_err(|error| error.to_string())
    };
    let found = verify(&["0x7f0002000000-0x7f0006000000"]).unwrap();
    assert_eq!((found[0].hva.start(), found[0].hva.len()), (Hva(0x7f00_0200_0000), ByteCount::mib(64)));
    for (range, why) in [
        ("7f0002000001-7f0006000000", "pages of 4 KiB"),
        ("7e0000000000..7e0000001000", "nothing is mapped"),
        ("7f0007000000-7f0008100000", "only a part"),
        ("7f0007000000-7f0009000000", "different kinds of mappings, or a hole"),
        ("7f0009000000-7f000a000000", "cannot be written"),
        ("7f000c200000-7f000c300000", "cannot be written"),
    ] {
        let error = verify(&[range]).unwrap_err();
        assert!(error.contains(why), "{range}: {error}");
    }
    let error = verify(&["7f0000000000-7f0000002000", "7f0000001000-7f0000003000"]).unwrap_err();
    assert!(error.contains("overlap"), "{error}");
}

#[test]
fn ranges_are_read_as_they_are_shown() {
    let range = parse_range("7f12..0x7f13").unwrap();
    assert_eq!(parse_range(&show(range)), Ok(range));
    for bad in ["", "1", "2-1", "1-1", "x-y", "-1-2", "1-99999999999999999"] {
        assert!(parse_range(bad).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn any_text_of_proc_is_read_without_a_panic(
        text in any::<String>(),
        line in "[0-9a-f]{1,17}-[0-9a-f]{1,17} [rwxps-]{4} [0-9a-f]{1,9} [0-9]{2}:[0-9]{2} [0-9]{1,20}( +[ -~]{0,20})?",
    ) {
        for text in [text, line] {
            let parsed = parse_smaps(&text);
            if let Ok(mappings) = parsed {
                let _ = Finder::new(&mappings, QEMU, &kind_of).locate(&[block("ram", 1, Backing::Unsaid)]);
            }
            let _ = parse_range(&text);
        }
    }

    #[test]
    fn what_is_found_has_the_size_it_should_and_overlaps_nothing(
        pieces in prop::collection::vec((0usize..4, 1u64..8), 1..20),
        sizes in prop::collection::vec(1u64..12, 1..4),
    ) {
        let kinds = ["anon", "none", "_", "rw-s 00000000 00:01 7 /memfd:x (deleted)"];
        let pieces: Vec<(&str, u64, &str)> =
            pieces.into_iter().map(|(kind, mib)| (kinds[kind], mib, "")).collect();
        let blocks: Vec<Block> = sizes.iter().map(|&mib| block("b", mib, Backing::Unsaid)).collect();
        if let Ok(found) = locate(&laid_out(&pieces), QEMU, &blocks) {
            let total: ByteCount = found.ranges.iter().map(|range| range.hva.len()).sum();
            assert_eq!(total, sizes.iter().map(|&mib| ByteCount::mib(mib)).sum());
            let mut ranges: Vec<HvaRange> = found.ranges.iter().map(|range| range.hva).collect();
            ranges.sort_by_key(|range| range.start());
            assert!(ranges.windows(2).all(|pair| pair[0].end() <= pair[1].start()));
        }
    }
}
