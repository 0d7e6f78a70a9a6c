//! An upgrade to a program that cannot take over: it is found out while the old manager works, and nothing becomes of it.
use super::daemon::{Directory, Machine, manager_of, wait_for_another};
use super::run::{Run, alone, can, wait_until};
use rustix::process::Signal;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Where the register says of which version it is, and the version that this build writes.
const VERSION_AT: u64 = 8;
const VERSION: u32 = 4;

/// The register of a daemon, as its keeper has it.
fn register_of(keeper: u32) -> File {
    let descriptors = fs::read_dir(format!("/proc/{keeper}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let is_register = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|file| file.to_string_lossy().contains("memfd:plimsoll-register"))
    };
    let path = descriptors.into_iter().find(is_register).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

/// Puts a program in the place of another, as a package manager does.
fn replace(program: &Path, with: &[u8]) {
    let new = program.with_extension("new");
    fs::write(&new, with).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(new, program).unwrap();
}

#[test]
fn a_program_that_cannot_go_on_with_what_there_is_leaves_the_old_manager_in_charge() {
    let _alone = alone();
    if !can("userfaultfd") || !can("root") {
        return;
    }
    let (directory, folder) = (Directory::new("refused"), tempfile::tempdir().unwrap());
    let program = folder.path().join("plimsoll");
    fs::copy(env!("CARGO_BIN_EXE_plimsoll"), &program).unwrap();
    let log = folder.path().join("said");
    let words = ["-c", "exec \"$0\" daemon --budget 64M --directory \"$1\" 2>\"$2\""];
    let words = [&words[..], &[program.to_str().unwrap(), directory.text(), log.to_str().unwrap()]].concat();
    let daemon = Run::of("/bin/sh".as_ref(), &words).start();
    wait_until("its manager serves", || manager_of(&directory).is_some());
    let manager = manager_of(&directory).unwrap();
    let mut machine = Machine::start(&directory);
    machine.verifies(1000);

    let mut refusals = 0;
    let mut is_refused = |why: &str| {
        daemon.signal(Signal::USR2);
        refusals += 1;
        let said = || fs::read_to_string(&log).unwrap();
        wait_until("it is refused", || said().matches("no upgrade, the manager goes on").count() == refusals);
        let said = said();
        assert!(said.contains(why), "{said}");
        machine.verifies(1000);
        assert_eq!(manager_of(&directory), Some(manager), "{said}");
    };
    let whole = fs::read(&program).unwrap();
    // One that does not know the question; none; and one that has nothing to say.
    for (instead, why) in [
        (&b"#!/bin/sh\nexit 2\n"[..], "exit status 2"),
        (b"none", "cannot be started"),
        (b"#!/bin/sh\nkill -9 $$\n", "signal 9"),
    ] {
        replace(&program, instead);
        is_refused(why);
    }
    replace(&program, &whole);
    let register = register_of(daemon.pid());
    for other in [1, 2, 3, VERSION + 1] {
        register.write_all_at(&u32::to_le_bytes(other), VERSION_AT).unwrap();
        is_refused(&format!("the machines' register is of version {other}"));
    }
    register.write_all_at(&VERSION.to_le_bytes(), VERSION_AT).unwrap();
    daemon.signal(Signal::USR2);
    wait_for_another(&directory, manager);
    machine.verifies(1000);
    machine.finish();
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}
