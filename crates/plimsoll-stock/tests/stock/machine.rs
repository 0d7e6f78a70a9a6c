//! What tests with stock guests need from this machine. The tests of `plimsoll attach` use this file, too.
use plimsoll_linux::cgroup::MemoryCgroup;
use plimsoll_linux::zram::ZramSwap;
use plimsoll_stock::{Guest, Kernel};
use plimsoll_sys::ProcessId;
use plimsoll_sys::process_memory::{Advice, advise};
use plimsoll_sys::swap::{SwapPriority, SwapRank};
use plimsoll_types::ByteCount;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Held while a test runs guests: emulated ones at once would only make each other slow.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this machine can run the test. One that lacks what `PLIMSOLL_REQUIRE` says it has is at fault.
pub(crate) fn can(capabilities: &[&str]) -> bool {
    for &capability in capabilities {
        let missing = match capability {
            "qemu" => absent("qemu-system-x86_64"),
            "gdb" => absent("gdb"),
            "pyelftools" => absent(PYELFTOOLS),
            "libvirt" => absent("libvirtd").or_else(|| absent("virtlogd")).or_else(|| absent("virsh")),
            "cloud-kernel" => Kernel::find().err().map(|error| error.to_string()),
            "root" => (!rustix::process::geteuid().is_root()).then(|| "not root".to_owned()),
            "zram" => {
                let control = Path::new("/sys/class/zram-control/hot_add");
                (!control.exists()).then(|| "no zram module".to_owned())
            }
            "ksm" => {
                (!Path::new("/sys/kernel/mm/ksm/run").exists()).then(|| "no KSM in this kernel".to_owned())
            }
            "cgroup" => {
                let made = MemoryCgroup::create("plimsoll-probe", ProcessId::own());
                made.err().map(|error| error.to_string())
            }
            other => panic!("no test knows of {other}"),
        };
        let Some(missing) = missing else { continue };
        let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|name| name == capability), "{capability} is required: {missing}");
        println!("SKIPPED: {missing}");
        return false;
    }
    true
}

/// Where Debian has it; a path is found wherever it is looked for.
const PYELFTOOLS: &str = "/usr/lib/python3/dist-packages/elftools/__init__.py";

fn absent(program: &str) -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = std::env::split_paths(&path).any(|folder| folder.join(program).exists());
    (!is_there).then(|| format!("{program} is not installed"))
}

/// Swap of this test's own. The kernel may use any other there is as well.
pub(crate) fn swap(size: ByteCount) -> ZramSwap {
    let priority = SwapRank::new(1).map_or(SwapPriority::Lowest, SwapPriority::Fixed);
    ZramSwap::create(size, &["lz4", "lzo-rle", "lzo"], priority).unwrap()
}

/// Has the kernel take all of the guest's RAM that nothing holds.
pub(crate) fn page_out(guest: &Guest) {
    let transfer = advise(guest.pidfd(), &guest.ram().unwrap(), Advice::PageOut);
    assert_eq!(transfer.stop, None, "{transfer:?}");
}
