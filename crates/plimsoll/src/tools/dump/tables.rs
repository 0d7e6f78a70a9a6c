//! What plimsoll's manager says of each page of a machine: from the daemon's API, for a note of the core file.
//!
//! Enters: the machine as it was found, and a daemon's directory. Leaves: a state for each of its pages, or why there are none. What must
//! never happen: states of another machine's pages, or of pages that are not those of its RAM: the daemon answers for a process and says
//! where its pages lie, and both are compared with what was found.
use super::super::machine::Machine;
use super::super::said;
use crate::live::escaped;
use plimsoll_host::api::client::{Client, ClientError};
use plimsoll_host::api::{Code, Region, Table};
use plimsoll_inspect::{GuestRam, PageStates};
use plimsoll_types::{Gpa, PAGE_SIZE};
use std::path::Path;

/// The daemon that manages a machine.
pub(super) struct Manager {
    client: Client,
    name: String,
    process: u32,
    regions: Vec<Region>,
}

impl Manager {
    /// The daemon of that directory, if the machine is handed over to it.
    pub(super) fn of(machine: &Machine, directory: &Path) -> Result<Self, String> {
        let (name, process) = (machine.dossier.name.clone(), machine.dossier.identity.process.get());
        let mut manager = Self { client: Client::of(directory), name, process, regions: Vec::new() };
        let table = manager.ask(0)?;
        manager.regions = checked(table.regions, &machine.ram)
            .map_err(|why| format!("the daemon says of {} that {why}", manager.name))?;
        Ok(manager)
    }

    /// What it says of all pages, now.
    pub(super) fn tables(
        self,
        stood_still: bool,
        mut go_on: impl FnMut() -> Result<(), String>,
    ) -> Result<PageStates, String> {
        let mut found = Gathered::new(self.regions.clone(), stood_still);
        while let Some(first) = found.next() {
            go_on()?;
            let table = self.ask(first)?;
            found.add(&table).map_err(|why| format!("the daemon says of {} that {why}", self.name))?;
        }
        Ok(found.pages)
    }

    fn ask(&self, first: u64) -> Result<Table, String> {
        // By its process, which is one; a machine may be called by that number, and by its name several.
        let path = |key: &str| format!("/v1/machines/{}/pages?first={first}", escaped(key));
        let table: Table = match self.client.get(&path(&self.process.to_string())) {
            Ok(table) => table,
            Err(ClientError::Refused(fault)) if fault.code == Code::NotFound => return Err(self.unmanaged()),
            Err(error) => return Err(format!("its tables: {}", said(error))),
        };
        if table.pid != Some(self.process) {
            return Err(self.unmanaged());
        }
        Ok(table)
    }

    fn unmanaged(&self) -> String {
        format!(
            "{} (pid {}) is not managed by that daemon, so nobody has tables of it: name the --directory of the daemon to which it was handed \
             over, or leave --tables out",
            self.name, self.process
        )
    }
}

/// Regions that are all of the machine's RAM.
fn checked(regions: Vec<Region>, ram: &GuestRam) -> Result<Vec<Region>, String> {
    let is_ram = |one: &Region| {
        let parts = ram.parts(Gpa(one.gpa), one.size_bytes).map(|part| part.hva.len().0).sum::<u64>();
        parts == one.size_bytes
    };
    let size = regions.iter().try_fold(0u64, |size, one| size.checked_add(one.size_bytes));
    if size != Some(ram.size().0) || !regions.iter().all(is_ram) {
        return Err("its RAM lies elsewhere than the machine says".to_owned());
    }
    Ok(regions)
}

/// Answers, one after the other.
struct Gathered {
    regions: Vec<Region>,
    pages: PageStates,
}

impl Gathered {
    fn new(regions: Vec<Region>, stood_still: bool) -> Self {
        let pages = regions.iter().map(|one| (Gpa(one.gpa), one.size_bytes / PAGE_SIZE as u64)).collect();
        Self { regions, pages: PageStates { stood_still, regions: pages, ..PageStates::default() } }
    }

    fn total(&self) -> u64 {
        self.pages.regions.iter().map(|(_, pages)| pages).sum()
    }

    /// The page that is to be asked for next, if not all are there.
    fn next(&self) -> Option<u64> {
        let have = self.pages.states.len() as u64;
        (have < self.total()).then_some(have)
    }

    fn add(&mut self, table: &Table) -> Result<(), String> {
        let have = self.pages.states.len() as u64;
        if table.page_bytes != PAGE_SIZE as u64
            || table.pages != self.total()
            || table.regions != self.regions
        {
            return Err("its RAM is another than a moment ago".to_owned());
        }
        let room = self.total() - have;
        if table.first != have || table.states.is_empty() || table.states.len() as u64 > room {
            return Err(format!(
                "{} pages follow page {}, and others were asked for",
                table.states.len(),
                table.first
            ));
        }
        if self.pages.names.is_empty() {
            self.pages.names.clone_from(&table.names);
        }
        if table.names != self.pages.names {
            return Err("its states have other names than a moment ago".to_owned());
        }
        let number = |digit: char| match digit {
            '?' => Some(PageStates::UNKNOWN),
            _ => digit.to_digit(16).and_then(|number| u8::try_from(number).ok()),
        };
        for digit in table.states.chars() {
            let state = number(digit).ok_or_else(|| format!("a page is {digit:?}"))?;
            self.pages.states.push(state);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_inspect::Piece;
    use plimsoll_sys::HvaRange;
    use plimsoll_types::{ByteCount, Hva};

    const PAGE: u64 = PAGE_SIZE as u64;

    fn regions() -> Vec<Region> {
        vec![Region { gpa: 0, size_bytes: 2 * PAGE }, Region { gpa: 8 * PAGE, size_bytes: 3 * PAGE }]
    }

    fn answer(first: u64, states: &str) -> Table {
        Table {
            name: "lonely".to_owned(),
            pid: Some(7),
            regions: regions(),
            page_bytes: PAGE,
            pages: 5,
            names: vec!["zero".to_owned(), "resident".to_owned()],
            first,
            states: states.to_owned(),
            next: None,
        }
    }

    #[test]
    fn answers_are_put_together_until_every_page_has_a_state() {
        let mut found = Gathered::new(regions(), true);
        assert_eq!(found.next(), Some(0));
        found.add(&answer(0, "011")).unwrap();
        assert_eq!(found.next(), Some(3));
        found.add(&answer(3, "?0")).unwrap();
        assert_eq!((found.next(), &found.pages.states[..]), (None, &[0, 1, 1, 255, 0][..]));
        assert_eq!(found.pages.regions, [(Gpa(0), 2), (Gpa(8 * PAGE), 3)]);
        assert!(found.pages.stood_still && found.pages.note().is_ok());
    }

    #[test]
    fn answers_that_do_not_follow_each_other_are_refused_and_nothing_is_asked_for_ever() {
        let refused = |change: fn(&mut Table)| {
            let mut found = Gathered::new(regions(), false);
            found.add(&answer(0, "01")).unwrap();
            let mut next = answer(2, "10");
            change(&mut next);
            found.add(&next).unwrap_err()
        };
        assert!(refused(|one| one.states.clear()).contains("0 pages follow"));
        assert!(refused(|one| one.states = "0000".to_owned()).contains("4 pages follow"));
        assert!(refused(|one| one.first = 0).contains("follow page 0"));
        assert!(refused(|one| one.states = "0g".to_owned()).contains("'g'"));
        assert!(refused(|one| one.states = "é".to_owned()).contains("'é'"));
        assert!(refused(|one| one.pages = u64::MAX).contains("another than"));
        assert!(refused(|one| one.page_bytes = 1).contains("another than"));
        assert!(refused(|one| one.regions.truncate(1)).contains("another than"));
        assert!(refused(|one| one.names.reverse()).contains("other names"));
    }

    #[test]
    fn regions_are_believed_where_the_machines_ram_is() {
        let piece = |gpa, hva, pages| Piece {
            gpa: Gpa(gpa * PAGE),
            hva: HvaRange::new(Hva(hva), ByteCount(pages * PAGE)).unwrap(),
        };
        let ram = GuestRam::new(vec![piece(0, 0x10_0000, 2), piece(8, 0x90_0000, 3)]).unwrap();
        assert_eq!(checked(regions(), &ram), Ok(regions()));
        let wrong = |change: fn(&mut Vec<Region>)| {
            let mut regions = regions();
            change(&mut regions);
            checked(regions, &ram).unwrap_err()
        };
        assert!(wrong(Vec::clear).contains("elsewhere"));
        assert!(wrong(|all| all[1].gpa = 7 * PAGE).contains("elsewhere"));
        assert!(wrong(|all| all[1].size_bytes = u64::MAX).contains("elsewhere"));
    }
}
