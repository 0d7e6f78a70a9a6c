//! A disk tier on a disk to which somebody else writes: a page is read as it was stored, or not at all.
use plimsoll_linux::disk::device::Disk;
use plimsoll_linux::disk::mover::Mover;
use plimsoll_linux::disk::tier::{Limits, Tier};
use plimsoll_linux::disk::window::Window;
use plimsoll_linux::disk::{SEGMENT_SIZE, fetch};
use plimsoll_linux::uffd::host::Domain;
use plimsoll_store::{Encoder, Fetched, Handle, HeapSlabs, NoDense, Store};
use plimsoll_types::{ByteCount, DomainId, GroupId, PAGE_SIZE, PageBytes};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Pages that are on the disk.
const PAGES: u8 = 8;
const ID: DomainId = DomainId(1);

/// A disk's bytes.
#[derive(Clone, Default)]
struct Bytes(Arc<Mutex<Vec<u8>>>);

impl Bytes {
    fn with<T>(&self, look: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Disk for Bytes {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.with(|bytes| {
            let rest =
                usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
            let length = rest.len().min(into.len());
            into[..length].copy_from_slice(&rest[..length]);
            Ok(length)
        })
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        self.with(|disk| {
            disk.resize(disk.len().max(start + bytes.len()), 0);
            disk[start..start + bytes.len()].copy_from_slice(bytes);
        });
        Ok(bytes.len())
    }

    fn reserve(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn shows_what_has_landed(&self) -> bool {
        true
    }

    fn empty(&self) -> io::Result<()> {
        self.with(Vec::clear);
        Ok(())
    }

    fn keepsake(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

fn page(number: u8) -> PageBytes {
    let mut page = [number; PAGE_SIZE];
    // Neither equal pages nor ones of a single value.
    (0..).zip(page.chunks_mut(64)).for_each(|(line, bytes): (u8, _)| bytes[0] = line ^ number << 2);
    page
}

/// Pages that a tier has put on a disk.
struct World {
    bytes: Bytes,
    tier: Arc<Tier>,
    domain: Arc<Domain<HeapSlabs>>,
    handles: Vec<Handle>,
}

impl World {
    fn new() -> Self {
        let bytes = Bytes::default();
        let limits = Limits { disk: ByteCount(16 * SEGMENT_SIZE as u64), domain: None };
        let mut tier = Tier::create(Box::new(bytes.clone()), limits).unwrap();
        tier.set_patience([Duration::ZERO; 2]);
        let tier = Arc::new(tier);
        let domain = Arc::new(Domain::new(ID, GroupId(1), Store::new(HeapSlabs::new(16))));
        let mut encoder = Encoder::new();
        let put = |number| {
            let stored = domain.store(|store| store.put(&page(number), &mut encoder)).unwrap();
            stored.unwrap().handle
        };
        let handles: Vec<Handle> = (1..=PAGES).map(put).collect();
        let mut mover = Mover::new(Arc::clone(&tier));
        for handle in &handles {
            mover.demote(&domain, *handle, None).unwrap();
        }
        assert_eq!(mover.flush().unwrap(), u64::from(PAGES));
        Self { bytes, tier, domain, handles }
    }
}

/// Reads bytes as changes of the disk, four each: what is added to the byte at which place.
pub(crate) fn read(bytes: &[u8]) -> bool {
    let world = World::new();
    let mut is_changed = false;
    world.bytes.with(|disk| {
        for change in bytes.as_chunks::<4>().0 {
            let [by, place @ ..] = change;
            let place = place.iter().fold(0, |place, byte| place << 8 | usize::from(*byte)) % disk.len();
            disk[place] = disk[place].wrapping_add(*by);
            is_changed |= *by != 0;
        }
    });
    let (mut fetched, mut window, mut lost) = (Fetched::new(), Window::default(), 0);
    for (number, handle) in (1..).zip(&world.handles) {
        let mut found = [0x55; PAGE_SIZE];
        match fetch(&world.domain, Some(&world.tier), *handle, &mut fetched, &mut window) {
            Ok(()) => {
                fetched.unpack(&mut found, &mut NoDense).unwrap();
                assert!(found == page(number), "page {number} reads as something else");
            }
            Err(_) => lost += 1,
        }
    }
    assert!(is_changed || lost == 0, "{lost} pages are lost of a disk that nobody has changed");
    lost == 0
}

pub(crate) fn examples() -> Vec<Vec<u8>> {
    // Nothing; and changes that change nothing.
    vec![Vec::new(), vec![0, 0, 0, 9, 0, 1, 2, 3]]
}
