//! Device trees, as they are meant and broken in every byte.
use plimsoll_core::frames::devicetree::{DeviceTreeError, claims};
use plimsoll_core::frames::firmware::{Claim, HostMap, HostRegion, Use};
use plimsoll_types::{ByteCount, Hpa, PageCount, Pfn};
use proptest::prelude::{any, prop, proptest};

const HEADER: usize = 40;

/// A tree that is being written.
struct Tree {
    structure: Vec<u8>,
    strings: Vec<u8>,
    reserved: Vec<(u64, u64)>,
}

fn word(number: usize) -> u32 {
    u32::try_from(number).expect("the tree is small")
}

fn padded(bytes: &mut Vec<u8>, more: &[u8]) {
    bytes.extend(more);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

impl Tree {
    /// Of a root whose children have addresses and sizes of so many words.
    fn new(address: u32, size: u32) -> Self {
        let mut tree = Self { structure: Vec::new(), strings: Vec::new(), reserved: Vec::new() };
        tree.begin("").words("#address-cells", &[address]).words("#size-cells", &[size]);
        tree
    }

    fn word(&mut self, word: u32) -> &mut Self {
        self.structure.extend(word.to_be_bytes());
        self
    }

    fn begin(&mut self, name: &str) -> &mut Self {
        self.word(1);
        padded(&mut self.structure, &[name.as_bytes(), b"\0"].concat());
        self
    }

    fn end(&mut self) -> &mut Self {
        self.word(2)
    }

    fn property(&mut self, name: &str, value: &[u8]) -> &mut Self {
        let at = self.strings.len();
        self.strings.extend([name.as_bytes(), b"\0"].concat());
        self.word(3).word(word(value.len())).word(word(at));
        padded(&mut self.structure, value);
        self
    }

    fn words(&mut self, name: &str, words: &[u32]) -> &mut Self {
        self.property(name, &words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<_>>())
    }

    fn memory(&mut self, name: &str, reg: &[u32]) -> &mut Self {
        self.begin(name).property("device_type", b"memory\0").words("reg", reg).end()
    }

    /// The whole tree.
    fn bytes(&mut self) -> Vec<u8> {
        let mut whole = self.structure.clone();
        // The root's end, and the tree's.
        whole.extend([2_u32, 9].iter().flat_map(|word| word.to_be_bytes()));
        let reserved: Vec<u8> = [&*self.reserved, &[(0, 0)]]
            .concat()
            .iter()
            .flat_map(|(start, bytes)| [start.to_be_bytes(), bytes.to_be_bytes()].concat())
            .collect();
        let structure = HEADER + reserved.len();
        let strings = structure + whole.len();
        let size = strings + self.strings.len();
        let words =
            [0xd00d_feed, size, structure, strings, HEADER, 17, 16, 0, self.strings.len(), whole.len()];
        let header = words.iter().flat_map(|number| word(*number).to_be_bytes());
        header.chain(reserved).chain(whole).chain(self.strings.iter().copied()).collect()
    }
}

const fn claim(start: u64, bytes: u64, what: Use) -> Claim {
    Claim { start: Hpa(start), bytes: ByteCount(bytes), what }
}

fn read(tree: &[u8]) -> Result<Vec<Claim>, DeviceTreeError> {
    let mut found = Vec::new();
    claims(tree, |claim| found.push(claim)).map(|()| found)
}

/// A board with two banks, of which firmware keeps a page; a region for a device, and one that is disabled.
fn board() -> Tree {
    let mut tree = Tree::new(2, 2);
    tree.reserved.push((0x8000_0000, 0x1000));
    tree.begin("cpus").words("#address-cells", &[1]).words("#size-cells", &[0]);
    tree.begin("cpu@0").property("device_type", b"cpu\0").words("reg", &[0]).end().end();
    tree.memory("memory@80000000", &[0, 0x8000_0000, 0, 0x4000_0000, 2, 0, 1, 0]);
    tree.begin("reserved-memory").words("#address-cells", &[1]).words("#size-cells", &[1]);
    tree.property("ranges", b"");
    tree.begin("shared@90000000").words("reg", &[0x9000_0000, 0x20_0000]).property("no-map", b"").end();
    tree.begin("off@a0000000").property("status", b"disabled\0").words("reg", &[0xa000_0000, 0x1000]).end();
    tree.begin("anywhere").words("size", &[0x100_0000]).end().end();
    tree
}

#[test]
fn memory_is_usable_and_what_is_reserved_in_either_way_is_not() {
    let found = read(&board().bytes()).unwrap();
    let expected = [
        claim(0x8000_0000, 0x1000, Use::Reserved),
        claim(0x8000_0000, 0x4000_0000, Use::Usable),
        claim(0x2_0000_0000, 0x1_0000_0000, Use::Usable),
        claim(0x9000_0000, 0x20_0000, Use::Reserved),
        claim(0xa000_0000, 0x1000, Use::Reserved),
    ];
    assert_eq!(found, expected);
    let map: HostMap<16> = HostMap::new(&found).unwrap();
    let region = |first, pages, what| HostRegion { first: Pfn(first), pages: PageCount(pages), what };
    let expected = [
        region(0x8_0000, 1, Use::Reserved),
        region(0x8_0001, 0xffff, Use::Usable),
        region(0x9_0000, 0x200, Use::Reserved),
        region(0x9_0200, 0xfe00, Use::Usable),
        region(0xa_0000, 1, Use::Reserved),
        region(0xa_0001, 0x1_ffff, Use::Usable),
        region(0x20_0000, 0x10_0000, Use::Usable),
    ];
    assert_eq!(map.regions(), expected);
}

#[test]
fn addresses_and_sizes_of_one_word_are_read_and_what_is_no_memory_of_the_host_is_left_alone() {
    let mut tree = Tree::new(1, 1);
    tree.word(4).memory("memory@0", &[0, 0x1000_0000]);
    // Somebody else's, one that is off, one without a place; below a bus; a property after the children of its node's.
    tree.begin("video@1").property("device_type", b"display\0").words("reg", &[1, 2]).end();
    tree.begin("memory@2").property("device_type", b"memory\0").property("status", b"disabled\0");
    tree.words("reg", &[2, 2]).end().memory("memory@3", &[]);
    tree.begin("soc").words("#address-cells", &[2]).memory("memory@4", &[0, 4, 4]).end();
    assert_eq!(read(&tree.bytes()), Ok(vec![claim(0, 0x1000_0000, Use::Usable)]));
}

#[test]
fn a_tree_that_contradicts_itself_is_refused_with_the_place() {
    let whole = board().bytes();
    let broken = |at: usize, word: u32| {
        let mut tree = whole.clone();
        tree[at..at + 4].copy_from_slice(&word.to_be_bytes());
        read(&tree)
    };
    assert_eq!(broken(0, 7), Err(DeviceTreeError::Magic { found: 7 }));
    assert_eq!(broken(20, 16), Err(DeviceTreeError::Version { version: 16, compatible: 16 }));
    assert_eq!(broken(24, 18), Err(DeviceTreeError::Version { version: 17, compatible: 18 }));
    assert!(matches!(broken(4, u32::MAX), Err(DeviceTreeError::Short { .. })));
    assert!(matches!(broken(8, u32::MAX), Err(DeviceTreeError::Short { .. })));
    // The first token, the second's length.
    let structure = HEADER + 32;
    assert_eq!(broken(structure, 5), Err(DeviceTreeError::Token { at: 0, found: 5 }));
    assert_eq!(broken(structure, 2), Err(DeviceTreeError::Nesting { at: 0 }));
    assert_eq!(broken(structure, 9), Err(DeviceTreeError::Nesting { at: 0 }));
    assert!(matches!(broken(structure + 12, u32::MAX), Err(DeviceTreeError::Short { .. })));
    assert_eq!(read(b"\0"), Err(DeviceTreeError::Short { at: 0 }));
    for reg in [&[0, 1, 2][..], &[0]] {
        let mut tree = Tree::new(1, 1);
        assert!(matches!(read(&tree.memory("memory", reg).bytes()), Err(DeviceTreeError::Reg { .. })));
    }
    for cells in [(0, 1), (1, 0), (3, 1), (1, u32::MAX)] {
        let mut tree = Tree::new(cells.0, cells.1);
        let read = read(&tree.memory("memory", &[0, 1]).bytes());
        assert!(matches!(read, Err(DeviceTreeError::Reg { .. })), "{cells:?}: {read:?}");
    }
    // A root that does not end, one that ends twice, two roots.
    let mut open = Tree::new(1, 1);
    open.begin("child");
    assert!(matches!(read(&open.bytes()), Err(DeviceTreeError::Nesting { .. })));
    let mut closed = Tree::new(1, 1);
    closed.end();
    assert!(matches!(read(&closed.bytes()), Err(DeviceTreeError::Nesting { .. })));
    let mut second = Tree::new(1, 1);
    second.end().begin("");
    assert!(matches!(read(&second.bytes()), Err(DeviceTreeError::Nesting { .. })));
}

#[test]
fn a_tree_is_read_or_refused_wherever_it_ends_and_whichever_bit_is_turned() {
    let whole = board().bytes();
    for end in 0..whole.len() {
        assert!(read(&whole[..end]).is_err(), "{end} of {}", whole.len());
    }
    for bit in 0..whole.len() * 8 {
        let mut tree = whole.clone();
        tree[bit / 8] ^= 1 << (bit % 8);
        // Whatever is made of it, it is made.
        let _ = read(&tree);
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(tail in prop::collection::vec(any::<u8>(), 0..512), words in prop::collection::vec(0_u32..11, 0..64)) {
        let mut tree = Tree::new(2, 2);
        words.iter().for_each(|word| { tree.word(*word); });
        tree.structure.extend(&tail);
        let _ = read(&tree.bytes());
        let _ = read(&tail);
    }
}
