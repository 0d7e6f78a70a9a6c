//! What tests need and a fresh Debian 12 with a Rust toolchain lacks.
//!
//! Enters: a table. Leaves: a machine on which every program of the table, the kernel of the stock guests, and what judges the
//! API are there. Nothing is asked of the network when nothing is missing. What must never happen: a package of the kernel's that
//! is installed, for that would change what the machine boots; or one of a service, which would be started
//! (systemd alone is none: without systemd-sysv nothing has it run the machine).
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A Debian package that some test needs.
struct Need {
    /// The lowest level of tests that needs it.
    level: u8,
    package: &'static str,
    /// A program of the package, or the path of a file: it is installed when this is found.
    program: &'static str,
    why: &'static str,
}

/// Levels 0 and 1 make their guests, control groups and swap devices themselves, so they need hardly anything.
const NEEDS: [Need; 16] = [
    Need { level: 0, package: "gcc", program: "cc", why: "links the rooms below the line without std" },
    Need { level: 1, package: "systemd", program: SYSTEMD, why: "runs the unit, in namespaces of its own" },
    Need { level: 1, package: "chromium", program: "chromium", why: "opens the dashboard" },
    Need { level: 1, package: "nodejs", program: "node", why: "drives the browser" },
    Need { level: 1, package: "npm", program: "npm", why: "brings what drives the browser" },
    Need { level: 2, package: "qemu-system-x86", program: "qemu-system-x86_64", why: "runs stock guests" },
    Need { level: 2, package: "libvirt-daemon-system", program: "libvirtd", why: "runs stock guests" },
    Need { level: 2, package: "libvirt-clients", program: "virsh", why: "speaks to libvirtd" },
    Need { level: 2, package: "valgrind", program: "valgrind", why: "counts instructions for `bench mmu`" },
    Need { level: 2, package: "gdb", program: "gdb", why: "reads dumps of guests" },
    Need { level: 2, package: "python3-pyelftools", program: PYELFTOOLS, why: "reads dumps of guests" },
    Need { level: 3, package: "binutils", program: "as", why: "assembles programs for models of processors" },
    Need { level: 3, package: "qemu-system-misc", program: "qemu-system-riscv64", why: "models RISC-V" },
    Need {
        level: 3,
        package: "binutils-riscv64-linux-gnu",
        program: "riscv64-linux-gnu-as",
        why: "assembles for it",
    },
    Need { level: 3, package: "qemu-system-arm", program: "qemu-system-aarch64", why: "models Arm" },
    Need {
        level: 3,
        package: "binutils-aarch64-linux-gnu",
        program: "aarch64-linux-gnu-as",
        why: "assembles for it",
    },
];
/// It need not run the machine.
pub(crate) const SYSTEMD: &str = "/usr/lib/systemd/systemd";
/// Of a package without programs.
pub(crate) const PYELFTOOLS: &str = "/usr/lib/python3/dist-packages/elftools/__init__.py";
/// The level whose tests boot stock guests.
const KERNEL_LEVEL: u8 = 2;
/// The level whose tests have the API judged.
const JUDGES_LEVEL: u8 = 1;
/// Tries the API by its description: an environment of Python's, below `target`.
const SCHEMATHESIS: &str = "schemathesis";
const SCHEMATHESIS_VERSION: &str = "4.32.5";
/// Drives the browser that opens the dashboard: a package of npm's without others, below `target`.
const PLAYWRIGHT: &str = "playwright-core";
const PLAYWRIGHT_VERSION: &str = "1.65.1";
/// Checks metrics and alerts: one program of the package `prometheus`, whose others nobody needs.
const PROMTOOL: &str = "/var/cache/plimsoll/promtool";
/// Depends on the newest kernel of its kind.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
/// Kernels of stock guests, unpacked: `VERSION/boot/vmlinuz-VERSION` and `VERSION/lib/modules/VERSION`.
/// `plimsoll_stock::Kernel` looks for them here.
const KERNELS: &str = "/var/cache/plimsoll/kernel";

/// True for root.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// True when a program, or the file of a path, is to be found.
pub(crate) fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).exists())
}

/// True when there is a kernel for stock guests.
pub(crate) fn has_kernel() -> bool {
    let is_kernel = |version: &fs::DirEntry| {
        let name = version.file_name();
        version.path().join("boot").join(format!("vmlinuz-{}", name.display())).exists()
    };
    fs::read_dir(KERNELS).is_ok_and(|versions| versions.flatten().any(|version| is_kernel(&version)))
}

/// True when every program is there that tests of that level run and those of lower levels do not.
pub(crate) fn has_all_of(level: u8) -> bool {
    NEEDS.iter().filter(|need| need.level == level).all(|need| is_there(need.program))
}

/// True when promtool is where tests look for it.
pub(crate) fn has_promtool() -> bool {
    Path::new(PROMTOOL).exists()
}

/// True when schemathesis is where tests look for it.
pub(crate) fn has_schemathesis() -> bool {
    schemathesis().join("bin/st").exists()
}

/// True when a browser and what drives it are where tests look for them.
pub(crate) fn has_browser() -> bool {
    is_there("chromium") && is_there("node") && has_playwright()
}

fn has_playwright() -> bool {
    playwright().join("node_modules").join(PLAYWRIGHT).exists()
}

/// Where tests look for it.
fn playwright() -> PathBuf {
    crate::cargo::root().join("target/playwright")
}

/// Where tests look for it.
fn schemathesis() -> PathBuf {
    crate::cargo::root().join("target").join(SCHEMATHESIS)
}

/// Brings what is missing for the tests of a level and of those below it, or for all.
pub(crate) fn run(level: Option<u8>) -> Result<()> {
    let is_wanted = |needed: u8| level.is_none_or(|level| needed <= level);
    let is_missing = |need: &&Need| is_wanted(need.level) && !is_there(need.program);
    let missing: Vec<&Need> = NEEDS.iter().filter(is_missing).collect();
    let lacks_kernel = is_wanted(KERNEL_LEVEL) && !has_kernel();
    let lacks_promtool = is_wanted(JUDGES_LEVEL) && !has_promtool();
    let lacks_schemathesis = is_wanted(JUDGES_LEVEL) && !has_schemathesis();
    let lacks_playwright = is_wanted(JUDGES_LEVEL) && !has_playwright();
    if missing.is_empty() && !lacks_kernel && !lacks_promtool && !lacks_schemathesis && !lacks_playwright {
        println!("setup: nothing is missing");
        return Ok(());
    }
    let mut packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    for need in &missing {
        println!("setup: {} is missing ({})", need.package, need.why);
    }
    for (is_lacking, what) in [
        (lacks_kernel, format!("no kernel for stock guests in {KERNELS}")),
        (lacks_promtool, format!("no promtool at {PROMTOOL} (checks metrics and alerts)")),
        (lacks_schemathesis, format!("no {SCHEMATHESIS} below target (tries the API)")),
        (lacks_playwright, format!("no {PLAYWRIGHT} below target (drives the browser)")),
    ] {
        if is_lacking {
            println!("setup: {what}");
        }
    }
    packages.extend((lacks_schemathesis && !has_venv()).then_some("python3-venv"));
    let mut wanted = packages.clone();
    wanted.extend(lacks_kernel.then_some("a kernel (see xtask/src/setup.rs)"));
    wanted.extend(lacks_promtool.then_some("promtool (see xtask/src/setup.rs)"));
    update(&wanted)?;
    add(&packages)?;
    if let Some(need) = missing.iter().find(|need| !is_there(need.program)) {
        bail!("{} is installed and {} is still not found", need.package, need.program);
    }
    for (is_lacking, bring) in [
        (lacks_schemathesis, bring_schemathesis as fn() -> Result<()>),
        (lacks_playwright, bring_playwright),
        (lacks_promtool, bring_promtool),
        (lacks_kernel, bring_kernel),
    ] {
        if is_lacking {
            bring()?;
        }
    }
    Ok(())
}

/// True when Python can make an environment.
fn has_venv() -> bool {
    let asked = Command::new("python3").args(["-c", "import ensurepip, venv"]).output();
    asked.is_ok_and(|output| output.status.success())
}

/// Installs schemathesis. It appears in its place whole or not at all.
fn bring_schemathesis() -> Result<()> {
    let place = schemathesis();
    // Scripts of an environment name its path, so it is made where it stays; the program comes last.
    crate::cargo::run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&place))?;
    let wanted = format!("{SCHEMATHESIS}=={SCHEMATHESIS_VERSION}");
    let mut install = Command::new(place.join("bin/pip"));
    crate::cargo::run(install.args(["install", "--quiet", "--disable-pip-version-check", &wanted]))
}

/// Installs it as npm does, without running anything of the package. npm puts it in its place when it is whole.
fn bring_playwright() -> Result<()> {
    let place = playwright();
    fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
    let mut install = Command::new("npm");
    install.args(["install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix"]).arg(&place);
    crate::cargo::run(install.arg(format!("{PLAYWRIGHT}@{PLAYWRIGHT_VERSION}")))
}

/// Downloads the package and takes the one program out of it.
fn bring_promtool() -> Result<()> {
    let place = Path::new(PROMTOOL);
    let unfinished = place.with_file_name(format!(".promtool-{}", std::process::id()));
    fs::create_dir_all(&unfinished).with_context(|| format!("cannot make {}", unfinished.display()))?;
    let outcome = unpack("prometheus", &unfinished).and_then(|unpacked| {
        let program = unpacked.join("usr/bin/promtool");
        fs::rename(program, place).with_context(|| format!("cannot move promtool to {PROMTOOL}"))
    });
    fs::remove_dir_all(&unfinished).with_context(|| format!("cannot remove {}", unfinished.display()))?;
    outcome
}

/// Installs packages that one command needs and no test does.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    update(packages)?;
    add(packages)
}

/// Has apt know the newest packages, if something is wanted of it.
fn update(wanted: &[&str]) -> Result<()> {
    if wanted.is_empty() {
        return Ok(());
    }
    if !is_root() || !is_there("apt-get") {
        bail!("install {} and try again; on Debian, as root, this is done for you", wanted.join(", "));
    }
    crate::cargo::run(apt().args(["update", "-q"]))
}

fn add(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    crate::cargo::run(apt().args(["install", "-qy", "--no-install-recommends"]).args(packages))
}

/// apt-get, which asks nobody and waits while another one runs.
fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "DPkg::Lock::Timeout=600"]);
    command
}

/// Downloads the newest cloud kernel and unpacks it. It appears in its place whole or not at all.
fn bring_kernel() -> Result<()> {
    let package = kernel_package()?;
    let version = package.trim_start_matches("linux-image-");
    let unfinished = Path::new(KERNELS).join(format!(".{}", std::process::id()));
    fs::create_dir_all(&unfinished).with_context(|| format!("cannot make {}", unfinished.display()))?;
    let outcome = unpack(&package, &unfinished).and_then(|unpacked| {
        let place = Path::new(KERNELS).join(version);
        match fs::rename(&unpacked, &place) {
            // Another setup was faster.
            Err(_) if has_kernel() => Ok(()),
            done => done.with_context(|| format!("cannot move the kernel to {}", place.display())),
        }
    });
    fs::remove_dir_all(&unfinished).with_context(|| format!("cannot remove {}", unfinished.display()))?;
    outcome?;
    println!("setup: kernel {version} is in {KERNELS}");
    Ok(())
}

/// The package that [`KERNEL_PACKAGE`] stands for today, by its `Depends:` field.
fn kernel_package() -> Result<String> {
    let mut command = Command::new("apt-cache");
    command.args(["show", "--no-all-versions", KERNEL_PACKAGE]);
    let output = command.output().context("cannot start apt-cache")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found = dependency(&text).filter(|_| output.status.success());
    found.with_context(|| {
        let said = String::from_utf8_lossy(&output.stderr);
        format!("apt-cache knows no kernel that {KERNEL_PACKAGE} depends on: {}", said.trim())
    })
}

/// The kernel among the dependencies of a package, as apt-cache shows it.
fn dependency(shown: &str) -> Option<String> {
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    let names = depends.split(',').filter_map(|one| one.split_whitespace().next());
    names.into_iter().find(|name| name.starts_with("linux-image-")).map(str::to_owned)
}

/// Downloads a package and unpacks it, both inside `folder`.
fn unpack(package: &str, folder: &Path) -> Result<PathBuf> {
    // As root apt downloads as another user, who may not write here, and then says so at length.
    let mut download = apt();
    download.args(["download", "-q", "-o", "APT::Sandbox::User=root", package]).current_dir(folder);
    crate::cargo::run(&mut download)?;
    let files = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let archive =
        files.flatten().map(|file| file.path()).find(|path| path.extension() == Some("deb".as_ref()));
    let archive = archive.with_context(|| format!("apt-get download of {package} left no package"))?;
    let unpacked = folder.join("unpacked");
    crate::cargo::run(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(&unpacked))?;
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_found_among_dependencies() {
        let shown = "Package: linux-image-cloud-amd64\nDepends: x (>= 1), linux-image-6.1.0-56-cloud-amd64 (= 6.1.1)\n";
        assert_eq!(dependency(shown).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(dependency("Package: linux-image-cloud-amd64\nDepends: libc6\n"), None);
        assert_eq!(dependency(""), None);
    }
}
