//! Our side: pages into a store over memfd slabs, and back.
//!
//! Enters: pages. Leaves: how fast they went in and came back, and what they took. The work on a page is that of the
//! pager after its capture: copy it into a buffer, hash it, look for its like, compress it, keep it.
use super::{Outcome, check, filled, offset};
use crate::session::timed;
use anyhow::{Context, Result};
use plimsoll_linux::dense::Zstd;
use plimsoll_linux::slabs::MemfdSlabs;
use plimsoll_store::{Cold, Encoder, Fetched, Handle, PackError, Packer, Progress, Store};
use plimsoll_sys::mapping::AnonymousMapping;
use plimsoll_types::{ByteCount, PAGE_SIZE, PageBytes};
use std::hint::black_box;

/// Slab memory for twice the pages: raw pages and their records fit. Room that is not used costs nothing.
const ROOM: u64 = 2;

/// Walks over the store until all that can be packed is.
const WALKS: u32 = 3;
/// Of one step of compaction, in the store's unit.
const WORK: u32 = 1 << 20;

/// One run, from an empty store.
pub(super) fn run(source: &[PageBytes]) -> Result<Outcome> {
    let memory = filled(source)?;
    let slabs = MemfdSlabs::create("plimsoll-bench", ByteCount(memory.len().0 * ROOM))?;
    let mut store = Store::new(slabs);
    let (handles, put) = timed(|| put_all(&memory, source.len(), &mut store));
    let handles = handles?;
    let held_warm = store.stats().held();
    let (read, get) = timed(|| get_all(&store, &handles));
    read?;
    let mut page = [0; PAGE_SIZE];
    for (place, (handle, expected)) in handles.iter().zip(source).enumerate() {
        get_page(&store, *handle, &mut page)?;
        check("the store", place, &page, expected)?;
    }
    let (packed, pack) = timed(|| pack_all(&mut store));
    let mut dense = packed?;
    let mut fetched = Fetched::new();
    for (place, (handle, expected)) in handles.iter().zip(source).enumerate() {
        match handle {
            Some(handle) => {
                store.fetch(*handle, &mut fetched).context("the store did not find a packed page")?;
                fetched.unpack(&mut page, &mut dense).context("the store did not unpack a page")?;
            }
            None => page.fill(0),
        }
        check("the store of packed pages", place, &page, expected)?;
    }
    let held_cold = (store.stats().held(), Some(pack));
    Ok(Outcome::new((source.len(), put), held_warm, held_cold, (handles.len(), get)))
}

/// Packs everything that can be packed densely, as the manager does with what has grown cold, and gives back what that
/// leaves empty.
fn pack_all(store: &mut Store<MemfdSlabs>) -> Result<Zstd> {
    let mut dense = Zstd::new().context("no memory for zstd")?;
    let (mut packer, mut fetched) = (Packer::new(), Fetched::new());
    // In the first walk every object is met, in the second it is offered.
    let mut walks = 0;
    while walks < WALKS {
        match store.next_cold(u32::MAX, &mut fetched) {
            Cold::Round => walks += 1,
            Cold::NotYet => {}
            Cold::Found => match packer.pack(&fetched, &mut dense) {
                Ok(packed) => _ = store.replace(&packed).context("the store did not take a packed page")?,
                Err(PackError::NotSmaller) => {}
                Err(error) => return Err(error).context("a page cannot be packed"),
            },
        }
    }
    while store.compact(WORK).progress == Progress::Working {}
    Ok(dense)
}

/// A handle for each page; none for zero pages, which the store does not keep.
fn put_all(
    memory: &AnonymousMapping,
    pages: usize,
    store: &mut Store<MemfdSlabs>,
) -> Result<Vec<Option<Handle>>> {
    let mut encoder = Encoder::new();
    let mut buffer = [0; PAGE_SIZE];
    let mut handles = Vec::with_capacity(pages);
    for page in 0..pages {
        memory.copy_from(offset(page), &mut buffer)?;
        let stored = store.put(&buffer, &mut encoder).context("the store did not take a page")?;
        handles.push(stored.map(|stored| stored.handle));
    }
    Ok(handles)
}

fn get_all(store: &Store<MemfdSlabs>, handles: &[Option<Handle>]) -> Result<()> {
    let mut page = [0; PAGE_SIZE];
    for handle in handles {
        get_page(store, *handle, &mut page)?;
        black_box(&page);
    }
    Ok(())
}

fn get_page(store: &Store<MemfdSlabs>, handle: Option<Handle>, page: &mut PageBytes) -> Result<()> {
    match handle {
        Some(handle) => store.get(handle, page).context("the store did not give a page back")?,
        None => page.fill(0),
    }
    Ok(())
}
