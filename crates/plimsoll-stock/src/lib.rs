//! Stock Linux guests under QEMU and libvirt, which verify every page and every disk block they read.
