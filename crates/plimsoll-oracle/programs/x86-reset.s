# From the reset vector into 32-bit code in RAM: the ROM, 64 KiB at the end of the first 4 GiB.
        .code16
        .globl _start
_start:
        .org 0xff00
gdt:    .quad 0
        .quad 0x00cf9b000000ffff
        .quad 0x00cf93000000ffff
gdt_pointer:
        .word 23
        .long 0xffffff00
begin:
        cli
        lgdtl %cs:gdt_pointer - _start
        mov %cr0, %eax
        or $1, %al
        mov %eax, %cr0
        mov $0x10, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %ss
        ljmpl $0x08, $0x100000
        .org 0xfff0
        jmp begin
        .org 0x10000
