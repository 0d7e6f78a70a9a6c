# Runs the cases of a batch by a device behind VT-d: batch.rs has the batch's form, vtd.rs what the words of a case mean.
#
# The device is QEMU's `edu`: 4 KiB of its own, and a DMA engine whose end is a message. That is an NMI here, which wakes a processor that is
# halted, and QEMU's clock jumps there meanwhile (-icount sleep=off). What the device has read it writes by tables of the program's.
        .set BASE, 0x100000
        .set IDT, 0x110000
        .set STACK, BASE + 0x8000
        .set ROOTS, 0x220000            # the root table of VT-d's, made by vtd.rs
        .set CONTEXT, 0x221000 + 0x20 * 16      # of device 4, function 0
        .set RESULT, 0x230000

        .set UNIT, 0xfed90000
        .set GCMD, 0x18
        .set RTADDR, 0x20
        .set CCMD, 0x28
        .set FSTS, 0x34
        .set IOTLB, 0xf8
        .set FRCD, 0x220

        .set EDU, 0xe0000000
        .set ACKNOWLEDGE, 0x64
        .set SOURCE, 0x80
        .set TARGET, 0x88
        .set COUNT, 0x90
        .set COMMAND, 0x98
        .set OWN, 0x40000               # where the device's own memory is to itself
        .set READ, 5                    # run, message
        .set WRITE, 7

        .code32
        .globl _start
_start:
        lgdt BASE + (gdt_pointer - _start)
        mov $0x20, %eax
        mov %eax, %cr4
        mov HEADER + 16, %eax
        mov %eax, %cr3
        mov $0xc0000080, %ecx
        mov $0x100, %eax
        xor %edx, %edx
        wrmsr
        mov $0x80000033, %eax
        mov %eax, %cr0
        ljmp $0x08, $BASE + (long - _start)

        .code64
long:
        mov $0x10, %eax
        mov %eax, %ss
        mov $STACK, %esp
        # A gate for vector 2.
        mov $IDT + 2 * 16, %edi
        lea message(%rip), %rsi
        mov %si, (%rdi)
        movl $0x8e000008, 2(%rdi)       # selector, interrupt gate
        shr $16, %rsi
        mov %si, 6(%rdi)
        lidt idt_pointer(%rip)
        # The device: its registers at EDU, its messages as NMIs.
        lea settings(%rip), %rsi
1:      lodsl
        test %eax, %eax
        jz 2f
        mov $0xcf8, %edx
        out %eax, %dx
        lodsl
        mov $0xcfc, %edx
        out %eax, %dx
        jmp 1b
2:      mov $UNIT, %ebp
        mov $EDU, %r12d
        movq $8, COUNT(%r12)
        movq $ROOTS, RTADDR(%rbp)
        movl $1 << 30, GCMD(%rbp)       # the root table is there
        movl $1 << 31, GCMD(%rbp)       # translate
        # What a write writes, behind what a read has read.
        call own
        mov $RESULT + 8, %eax
        mov %rax, SOURCE(%r12)
        movq $OWN + 8, TARGET(%r12)
        mov $READ, %eax
        call transfer
        mov $HEADER + 128, %ebx         # the case

next:
        mov $HEADER, %eax
        mov (%rax), %rcx
        cmp 8(%rax), %rcx
        je done
        put_words
        mov 16(%rbx), %rax
        call tables
        mov 8(%rbx), %rax
        cmpq $0, (%rbx)
        jne 3f
        mov %rax, SOURCE(%r12)
        movq $OWN, TARGET(%r12)
        mov $READ, %eax
        jmp 4f
3:      movq $OWN + 8, SOURCE(%r12)
        mov %rax, TARGET(%r12)
        mov $WRITE, %eax
4:      call transfer
        mov FSTS(%rbp), %eax
        mov %rax, 64(%rbx)
        mov FRCD(%rbp), %rax
        mov %rax, 72(%rbx)
        mov FRCD + 8(%rbp), %rax
        mov %rax, 80(%rbx)
        mov %rax, FRCD + 8(%rbp)        # F is cleared by writing it
        movl $1, FSTS(%rbp)
        # What was read is written where the program finds it.
        cmpq $0, (%rbx)
        jne 5f
        cmpq $0, 64(%rbx)
        jne 5f
        call own
        movq $OWN, SOURCE(%r12)
        mov $RESULT, %eax
        mov %rax, TARGET(%r12)
        mov $WRITE, %eax
        call transfer
        mov RESULT, %rax
        mov %rax, 88(%rbx)
5:      take_words
        mov %rsi, %rbx
        mov $HEADER, %eax
        incq 8(%rax)
        jmp next

done:   finish

        # The device has the program's tables, or those at %rax.
own:    mov HEADER + 24, %rax
tables: or $1, %rax
        mov %rax, CONTEXT
        mov HEADER + 32, %rax
        mov %rax, CONTEXT + 8
        mov $5, %eax                    # all of the context cache
        shl $61, %rax
        mov %rax, CCMD(%rbp)
        mov $9, %eax                    # all of the IOTLB
        shl $60, %rax
        mov %rax, IOTLB(%rbp)
        ret

        # Transfers by the command in %eax, and waits for the end.
transfer:
        xor %r13d, %r13d
        mov %rax, COMMAND(%r12)
1:      hlt
        test %r13d, %r13d
        jz 1b
        movl $0x100, ACKNOWLEDGE(%r12)
        ret

message:
        inc %r13d
        iretq

        # Configuration space, an address and what is written there: the first register's place, the message's, both switched on.
settings:
        .long 0x80002010, EDU
        .long 0x80002044, 0xfee00000
        .long 0x80002048, 0
        .long 0x8000204c, 0x400
        .long 0x80002040, 0x00810005
        .long 0x80002004, 6
        .long 0

        .org 0x1000
gdt:    .quad 0
        .quad 0x00af9b000000ffff        # 0x08 code
        .quad 0x00cf93000000ffff        # 0x10 data
gdt_pointer:
        .word gdt_pointer - gdt - 1
        .quad BASE + 0x1000
idt_pointer:
        .word 32 * 16 - 1
        .quad IDT
        .org 0x2000
