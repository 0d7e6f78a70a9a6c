//! The kernel of the guests: Debian's cloud kernel, unpacked but not installed.
//!
//! Enters: the folder that `cargo xtask setup` fills. Leaves: its image, and the modules that a guest needs in an order in
//! which they load. What must never happen: a module before one that it depends on.
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Kernels are `VERSION/boot/vmlinuz-VERSION` and `VERSION/lib/modules/VERSION` here. `xtask/src/setup.rs` puts them there.
const KERNELS: &str = "/var/cache/plimsoll/kernel";

/// No kernel, or not all of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// There is no kernel.
    #[error("no kernel for stock guests in {KERNELS}: run `cargo xtask setup` as root")]
    Missing,
    /// A file cannot be read.
    #[error("cannot read {path:?}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the kernel of this host said.
        #[source]
        source: io::Error,
    },
    /// A module is not among those of the kernel.
    #[error(
        "kernel {version} has no module {module}.ko: remove {KERNELS}/{version} and run `cargo xtask setup`"
    )]
    NoModule {
        /// The kernel.
        version: String,
        /// The module.
        module: String,
    },
}

/// A kernel on this host's disk.
#[derive(Clone, Debug)]
pub struct Kernel {
    version: String,
    folder: PathBuf,
}

/// A module as it lies in the kernel's package.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

impl Kernel {
    /// The newest kernel there is.
    ///
    /// # Errors
    /// When `cargo xtask setup` has not brought one.
    pub fn find() -> Result<Self, KernelError> {
        let folders = fs::read_dir(KERNELS).map_err(|_| KernelError::Missing)?.flatten();
        let kernels = folders
            .map(|entry| Self { version: entry.file_name().display().to_string(), folder: entry.path() });
        let whole = kernels.filter(|kernel| kernel.image().exists());
        whole.max_by_key(|kernel| numbers(&kernel.version)).ok_or(KernelError::Missing)
    }

    /// What `uname -r` says in the guest.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The compressed image, as boot loaders and `qemu -kernel` take it.
    pub fn image(&self) -> PathBuf {
        self.folder.join("boot").join(format!("vmlinuz-{}", self.version))
    }

    /// The modules of these names and all that they need, in an order in which they load.
    pub(crate) fn modules(&self, wanted: &[&str]) -> Result<Vec<Module>, KernelError> {
        let mut paths = BTreeMap::new();
        find_modules(&self.folder.join("lib/modules").join(&self.version).join("kernel"), &mut paths)?;
        let mut modules = Vec::new();
        for name in wanted {
            self.add(name, &paths, &mut modules)?;
        }
        Ok(modules)
    }

    /// Adds a module after what it depends on. The kernel's build refuses circles.
    fn add(
        &self,
        name: &str,
        paths: &BTreeMap<String, PathBuf>,
        modules: &mut Vec<Module>,
    ) -> Result<(), KernelError> {
        if modules.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let missing = || KernelError::NoModule { version: self.version.clone(), module: name.to_owned() };
        let path = paths.get(name).ok_or_else(missing)?;
        let bytes = fs::read(path).map_err(|source| KernelError::Read { path: path.clone(), source })?;
        for needed in dependencies(&bytes) {
            self.add(&needed, paths, modules)?;
        }
        modules.push(Module { name: name.to_owned(), bytes });
        Ok(())
    }
}

/// The numbers in a version, for comparing: `6.1.0-56` is newer than `6.1.0-9`.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

fn find_modules(folder: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<(), KernelError> {
    let error = |source| KernelError::Read { path: folder.to_owned(), source };
    for entry in fs::read_dir(folder).map_err(error)? {
        let path = entry.map_err(error)?.path();
        if path.is_dir() {
            find_modules(&path, found)?;
        } else if path.extension() == Some("ko".as_ref())
            && let Some(name) = path.file_stem()
        {
            // Files may be named with a dash where modules have an underscore.
            found.insert(name.display().to_string().replace('-', "_"), path);
        }
    }
    Ok(())
}

/// What a module says it depends on. Its section `.modinfo` is a row of `name=value`, each ended by a zero byte; no other
/// part of a module holds a text of this form.
fn dependencies(module: &[u8]) -> Vec<String> {
    let texts = module.split(|byte| *byte == 0);
    let depends = texts.into_iter().find_map(|text| text.strip_prefix(b"depends="));
    let names = String::from_utf8_lossy(depends.unwrap_or_default()).into_owned();
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        assert!(numbers("6.1.0-56-cloud-amd64") > numbers("6.1.0-9-cloud-amd64"));
        assert!(numbers("6.12.0-1-cloud-amd64") > numbers("6.1.0-56-cloud-amd64"));
    }

    #[test]
    fn dependencies_are_read_from_a_modules_own_words() {
        assert_eq!(
            dependencies(b"\x7fELF\0alias=x\0depends=virtio,virtio-ring\0a=b\0"),
            ["virtio", "virtio_ring"]
        );
        assert!(dependencies(b"\x7fELF\0depends=\0").is_empty());
        assert!(dependencies(b"\x7fELF").is_empty());
    }

    #[test]
    fn modules_come_after_what_they_depend_on() {
        let kernel = match Kernel::find() {
            Ok(kernel) => kernel,
            Err(missing) => {
                let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
                assert!(!required.split(',').any(|name| name == "cloud-kernel"), "{missing}");
                println!("SKIPPED: {missing}");
                return;
            }
        };
        let modules = kernel.modules(&["virtio_balloon", "virtio_blk"]).unwrap();
        let place = |name| modules.iter().position(|module| module.name == name).unwrap();
        assert!(place("virtio") < place("virtio_balloon") && place("virtio_ring") < place("virtio_balloon"));
        assert!(place("virtio_ring") < place("virtio_blk"));
        assert_eq!(modules.iter().filter(|module| module.name == "virtio").count(), 1);
        let error = kernel.modules(&["virtio_teapot"]).unwrap_err();
        assert!(error.to_string().contains("no module virtio_teapot.ko"), "{error}");
    }
}
