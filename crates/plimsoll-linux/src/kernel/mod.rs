//! Memory of machines that hand nothing over, managed from outside with the kernel's own mechanisms.
