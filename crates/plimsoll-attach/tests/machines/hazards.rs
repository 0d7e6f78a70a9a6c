//! Machines whose memory must not be taken are looked at as a whole, and what must not be done with it is off, each for its
//! reason.

use crate::fake::Fake;
use crate::{MIB_64, nothing_known, skip};
use plimsoll_attach::{Dossier, Hazard, RamBacking, Rung, Rungs, inspect};
use plimsoll_linux::cgroup::MemoryCgroup;
use plimsoll_linux::cgroup::foreign::{ProcessCgroup, SwapRight};
use plimsoll_sys::ProcessId;
use rustix::fs::{FlockOperation, flock, statfs};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::symlink;
use std::path::Path;

fn look(fake: &Fake) -> Dossier {
    inspect(&fake.held(), &nothing_known()).unwrap()
}

/// A QEMU with RAM of its own that has done those things, too.
fn qemu_that(commands: &[&str]) -> Fake {
    let mut fake = Fake::start("qemu-system-x86_64", "-m 64");
    fake.tell(&format!("anonymous {MIB_64}"));
    commands.iter().for_each(|command| drop(fake.tell(command)));
    fake
}

fn assert_all_off(dossier: &Dossier, why: &Hazard) {
    assert!(Rung::ALL.iter().all(|&rung| dossier.rungs().off(rung) == Some(why)), "{why:?}: {dossier}");
}

#[test]
fn a_device_with_direct_access_turns_every_rung_off() {
    if !rustix::process::geteuid().is_root() {
        return skip("root", "not root, so no file can look like a device's");
    }
    for file in ["/dev/vfio/42", "/dev/vfio/devices/vfio0", "/dev/iommu", "/dev/vhost-vdpa-0"] {
        let fake = qemu_that(&["open /dev/vhost-net", &format!("open {file}")]);
        assert_all_off(&look(&fake), &Hazard::DirectDevice { file: file.to_owned() });
    }
    assert!(look(&qemu_that(&["open /dev/vhost-net"])).rungs().allows(Rung::GuestFree));
}

#[test]
fn memory_that_kvm_keeps_from_the_host_turns_every_rung_off() {
    let mut fake = qemu_that(&[]);
    assert!(look(&fake).rungs().allows(Rung::GuestFree));
    // Where KVM makes none for machines like this one, another file looks like it.
    let made = fake.ask("guest-memfd 2097152");
    let file = if made.is_ok() { "anon_inode:[kvm-gmem]" } else { "/anon_inode:[kvm-gmem]" };
    if made.is_err() && fake.ask(&format!("open {file}")).is_err() {
        return skip("root", "no guest_memfd can be made, and not root, so no file can look like one");
    }
    assert_all_off(&look(&fake), &Hazard::Confidential { evidence: format!("{file} is open") });
}

fn forbids_swap(dossier: &Dossier, cgroup: &Path) -> bool {
    let forbidden = Hazard::SwapForbidden { cgroup: cgroup.display().to_string() };
    dossier.rungs().off(Rung::KernelPaging) == Some(&forbidden)
        && dossier.rungs().off(Rung::Disk) == Some(&forbidden)
}

#[test]
fn a_cgroup_that_forbids_swap_turns_paging_off_for_as_long_as_it_does() {
    let cgroup = match MemoryCgroup::create("plimsoll-test-attach", ProcessId::own()) {
        Err(error) if error.is_of_the_host() => return skip("cgroup", &error.to_string()),
        made => made.unwrap(),
    };
    let mut fake = qemu_that(&[]);
    cgroup.enter(fake.process()).unwrap();
    let put = |file: &str, text: &str| fs::write(cgroup.path().join(file), text).unwrap();
    let has = |file: &str| cgroup.path().join(file).exists();
    let v1 = [
        ("memory.swappiness", "0", "60"),
        // One of memory and swap together that is no higher than that of memory.
        ("memory.memsw.limit_in_bytes", "268435456", "-1"),
    ];
    let ways = if has("memory.swap.max") { vec![("memory.swap.max", "0", "max")] } else { v1.to_vec() };
    let ways: Vec<_> = ways.into_iter().filter(|(file, ..)| has(file)).collect();
    if has("memory.memsw.limit_in_bytes") {
        put("memory.limit_in_bytes", "268435456");
    }
    for (file, forbidding, free) in &ways {
        put(file, forbidding);
        assert!(forbids_swap(&look(&fake), cgroup.path()), "{file}: {}", look(&fake));
        put(file, free);
        // Those above it may forbid it still.
        let right = ProcessCgroup::of(fake.process()).unwrap().swap_right().unwrap();
        assert_eq!(forbids_swap(&look(&fake), cgroup.path()), right == SwapRight::Forbidden, "{file}");
    }
    assert!(look(&fake).rungs().allows(Rung::GuestFree));
    fake.end();
    cgroup.remove().unwrap();
    if ways.is_empty() {
        println!("SKIPPED: this kernel counts no swap for cgroups");
    }
}

#[test]
fn whoever_may_not_advise_other_processes_pages_nothing() {
    let fake = qemu_that(&[]);
    let missing = Hazard::MissingCapability { capability: "CAP_SYS_NICE" };
    let held = capabilities(None).unwrap().effective.contains(CapabilitySet::SYS_NICE);
    assert_eq!(look(&fake).hazards.contains(&missing), !held);
    // Capabilities are a thread's.
    let dossier = std::thread::scope(|scope| {
        let without = || {
            let mut sets = capabilities(None).unwrap();
            sets.effective.remove(CapabilitySet::SYS_NICE);
            set_capabilities(None, sets).unwrap();
            look(&fake)
        };
        scope.spawn(without).join().unwrap()
    });
    assert!(dossier.hazards.contains(&missing), "{dossier}");
    let allowed = [Rung::KernelPaging, Rung::Disk, Rung::Balloon].map(|rung| dossier.rungs().allows(rung));
    assert_eq!(allowed, [false, false, true], "{dossier}");
}

#[test]
fn guests_that_are_protected_from_the_host_have_every_rung_off() {
    const QEMU: &str = "qemu-system-x86_64 -m 64";
    const CLOUD_HYPERVISOR: &str = "cloud-hypervisor --memory size=64M --platform";
    for (machine, said, evidence) in [
        (QEMU, "-object sev-guest,id=s,cbitpos=51", "-object sev-guest"),
        (QEMU, "-object sev-snp-guest,id=s", "-object sev-snp-guest"),
        (QEMU, "-object tdx-guest,id=t -machine q35,confidential-guest-support=t", "-object tdx-guest"),
        // As libvirt writes it.
        (
            QEMU,
            r#"-object {"qom-type":"tdx-guest","id":"lsec0","attributes":268435456}"#,
            "-object tdx-guest",
        ),
        (QEMU, "-object s390-pv-guest,id=p", "-object s390-pv-guest"),
        (QEMU, "-machine q35,confidential-guest-support=l", "confidential-guest-support=l"),
        (CLOUD_HYPERVISOR, "tdx=on", "--platform tdx=on"),
        (CLOUD_HYPERVISOR, "sev_snp=on", "--platform sev_snp=on"),
    ] {
        let (program, line) = machine.split_once(' ').unwrap();
        let mut fake = Fake::start(program, &format!("{line} {said}"));
        fake.tell(&format!("anonymous {MIB_64}"));
        assert_all_off(&look(&fake), &Hazard::Confidential { evidence: evidence.to_owned() });
    }
}

/// Room for one huge page more than the host keeps, until it is dropped.
struct RoomForOne {
    /// Locked: whoever else makes room waits, so that each puts back what the first has found.
    limit: File,
    found: String,
}

impl RoomForOne {
    fn make() -> io::Result<Self> {
        let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";
        let mut limit = File::options().read(true).write(true).open(path)?;
        flock(&limit, FlockOperation::LockExclusive)?;
        let mut found = String::new();
        limit.read_to_string(&mut found)?;
        let mut room = Self { limit, found };
        let pages: u64 = room.found.trim().parse().unwrap();
        room.put(&(pages + 1).to_string())?;
        Ok(room)
    }

    fn put(&mut self, pages: &str) -> io::Result<()> {
        self.limit.rewind()?;
        self.limit.write_all(pages.as_bytes())
    }
}

impl Drop for RoomForOne {
    fn drop(&mut self) {
        let found = self.found.clone();
        drop(self.put(&found));
    }
}

#[test]
fn ram_in_huge_pages_that_cannot_be_swapped_is_not_paged() {
    let _room = match RoomForOne::make() {
        Ok(room) => room,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return println!("SKIPPED: this kernel has no huge pages of 2 MiB");
        }
        Err(error) => return skip("root", &format!("no room can be made for huge pages: {error}")),
    };
    for (program, line) in [
        (
            "qemu-system-x86_64",
            "-object memory-backend-memfd,id=r,size=2M,hugetlb=on,share=on -machine memory-backend=r",
        ),
        ("cloud-hypervisor", "--memory size=2M,hugepages=on,shared=on"),
    ] {
        let mut fake = Fake::start(program, line);
        let place = fake.map("huge 2097152");
        let dossier = look(&fake);
        let [ram] = &dossier.ram[..] else { panic!("{dossier}") };
        assert_eq!((ram.hva, &ram.hazards[..]), (place, &[Hazard::HugeTlb][..]), "{line}");
        assert_eq!(ram.backing, RamBacking::HugeTlb { name: "/memfd:huge (deleted)".to_owned() });
        let rungs = Rungs::under(ram.hazards.iter());
        assert_eq!(Rung::ALL.map(|rung| rungs.allows(rung)), [true, false, false, false, false]);
        assert_eq!(dossier.rungs().off(Rung::Balloon), Some(&Hazard::HugeTlb));
        assert!(!dossier.rungs().allows(Rung::KernelPaging), "{dossier}");
    }
}

/// What lies under the RAM of a QEMU whose memory is a file, and why which rungs are off for it.
fn of_file(fake: &Fake) -> (RamBacking, Vec<Hazard>) {
    let dossier = look(fake);
    let [ram] = &dossier.ram[..] else { panic!("{dossier}") };
    (ram.backing.clone(), ram.hazards.clone())
}

#[test]
fn ram_in_a_file_goes_to_swap_from_a_file_system_in_memory_and_nowhere_from_a_disk() {
    const TMPFS: i64 = 0x0102_1994;
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let system = |folder: &Path| statfs(folder).unwrap().f_type;
    if system(memory.path()) != TMPFS || system(disk.path()) == TMPFS {
        return println!("SKIPPED: /dev/shm is no tmpfs, or the tests were built on one");
    }
    for (root, is_disk) in [(memory.path(), false), (disk.path(), true)] {
        let folder = root.join("ram");
        fs::create_dir(&folder).unwrap();
        let (folder, file) = (folder.as_path(), folder.join("file"));
        let line = format!(
            "-object memory-backend-file,id=r,size=64M,share=on,mem-path={} -machine memory-backend=r",
            folder.display()
        );
        let mut fake = Fake::start("qemu-system-x86_64", &line);
        fake.tell(&format!("file {} {MIB_64}", file.display()));
        let on_disk =
            |path: String| (RamBacking::SharedFile { path: path.clone() }, vec![Hazard::DiskFile { path }]);
        let in_memory = |name| (RamBacking::SharedMemory { name }, vec![Hazard::SharedPages]);
        let by_place = |name| if is_disk { on_disk(name) } else { in_memory(name) };
        let (there, gone) = (file.display().to_string(), format!("{} (deleted)", file.display()));
        assert_eq!(of_file(&fake), by_place(there));
        // As QEMU does it in a folder.
        fs::remove_file(&file).unwrap();
        assert_eq!(of_file(&fake), by_place(gone.clone()));
        // What is nowhere may lie anywhere.
        fs::remove_dir(folder).unwrap();
        assert_eq!(of_file(&fake), on_disk(gone.clone()));
        // What has its name now lies elsewhere.
        let elsewhere = if is_disk { memory.path() } else { disk.path() };
        fs::write(elsewhere.join("file"), "").unwrap();
        symlink(elsewhere, folder).unwrap();
        assert_eq!(of_file(&fake), on_disk(gone));
    }
}
