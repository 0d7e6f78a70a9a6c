//! What a VMM hands over, without processors. Tests of other crates use this file, too.
use plimsoll_core::layout::{GuestLayout, Region};
use plimsoll_linux::uffd::wire::Hello;
use plimsoll_sys::mapping::{AnonymousMapping, HugePages};
use plimsoll_sys::uffd::{Features, Mode, RegisterMode, Userfaultfd};
use plimsoll_types::{BLOCK_SIZE, ByteCount, Gpa};

/// Its memory.
pub(crate) const RAM: ByteCount = ByteCount::mib(4);

/// What RAM's descriptor has to be able to do.
pub(crate) const RAM_FEATURES: Features =
    Features::EVENT_REMOVE.union(Features::EVENT_UNMAP).union(Features::MOVE).union(Features::POISON);

/// Memory and descriptors as a VMM hands them over.
pub(crate) struct Goods {
    pub(crate) hello: Hello,
    pub(crate) ram: Userfaultfd,
    pub(crate) airlock: Userfaultfd,
    pub(crate) memory: AnonymousMapping,
    pub(crate) slots: AnonymousMapping,
}

impl Goods {
    pub(crate) fn new(name: &str) -> Self {
        let open = |features| {
            let uffd = Userfaultfd::open(Mode::KernelAndUser).unwrap();
            uffd.handshake(features).unwrap();
            uffd
        };
        let ram = open(RAM_FEATURES);
        let airlock = open(Features::MOVE);
        let memory = AnonymousMapping::new(RAM, HugePages::Never).unwrap();
        let slots = AnonymousMapping::new(ByteCount(BLOCK_SIZE as u64), HugePages::Never).unwrap();
        ram.register(memory.unborrowed(memory.range()).unwrap(), RegisterMode::MISSING).unwrap();
        airlock.register(slots.unborrowed(slots.range()).unwrap(), RegisterMode::MISSING).unwrap();
        let hello = Hello {
            name: name.to_owned(),
            shard: 0,
            shards: 1,
            layout: GuestLayout::new(vec![Region { start: Gpa(0), bytes: RAM }]).unwrap(),
            hvas: vec![memory.base()],
            airlock_base: slots.base(),
            airlock_slots: 1,
            features: RAM_FEATURES.bits(),
        };
        Self { hello, ram, airlock, memory, slots }
    }
}
