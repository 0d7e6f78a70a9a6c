# Runs the cases of a batch on an x86-64 processor: record.rs has the batch's form, x86.rs what the words of a case mean.
#
# Linear is physical below 2 GiB in every tree, by the root's first entry, so that this goes on whatever else a tree says. What
# runs at CPL 3 is the page `user`, which the same entry maps at USER as well.
        .set BASE, 0x100000
        .set IDT, 0x110000
        .set USER, 0xc0000000
        .set STORED, 0x53544f5245442121
        .set STACK, BASE + 0x8000
        .set OUTSIDE, 0x80000000

        .code32
        .globl _start
_start:
        jmp begin


begin:
        lgdt BASE + (gdt_pointer - _start)
        mov HEADER + 16, %eax
        mov %eax, %cr4
        mov HEADER + 24, %eax
        mov %eax, %cr3
        mov $0xc0000080, %ecx
        mov $0x900, %eax                # LME, NXE
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
        # Gates to the stubs below, vector 3 from CPL 3 too.
        mov $IDT, %edi
        lea vectors(%rip), %rsi
        mov $32, %ecx
1:      mov %si, (%rdi)
        movw $0x08, 2(%rdi)
        movw $0xee00, 4(%rdi)
        mov %rsi, %rax
        shr $16, %rax
        mov %ax, 6(%rdi)
        movq $0, 8(%rdi)
        add $16, %rdi
        add $16, %rsi
        dec %ecx
        jnz 1b
        lidt idt_pointer(%rip)
        mov $0x38, %eax
        ltr %ax
        movq $HEADER + 128, current(%rip)

next:
        mov $HEADER, %eax
        mov (%rax), %rcx
        cmp 8(%rax), %rcx
        je done
        mov current(%rip), %rbx
        put_words
        # The descriptor of a table at the address, for implicit accesses: limit 0xffff, an LDT.
        mov 8(%rbx), %rdi
        mov $0xffff, %eax
        mov %ax, ldt(%rip)
        mov %di, ldt + 2(%rip)
        mov %rdi, %rax
        shr $16, %rax
        mov %al, ldt + 4(%rip)
        movb $0x82, ldt + 5(%rip)
        movb $0, ldt + 6(%rip)
        mov %ah, ldt + 7(%rip)
        shr $16, %rax
        mov %eax, ldt + 8(%rip)
        movl $0, ldt + 12(%rip)
        cmpq $7, (%rbx)
        jne 3f
        mov $0x28, %eax
        lldt %ax
3:      # EFER, CR4, PKRU, CR0, CR3.
        mov $0xc0000080, %ecx
        mov 40(%rbx), %eax
        xor %edx, %edx
        wrmsr
        mov 32(%rbx), %rax
        mov %rax, %cr4
        bt $22, %rax
        jnc 4f
        xor %ecx, %ecx
        xor %edx, %edx
        mov 48(%rbx), %eax
        wrpkru
4:      mov 24(%rbx), %rax
        mov %rax, %cr0
        xor %eax, %eax
        mov %rax, %cr2
        mov 16(%rbx), %rax
        mov %rax, %cr3
        # The access: 0 to 2 here, 4 to 7 at CPL 3.
        mov $STORED, %rsi
        mov (%rbx), %rcx
        mov 56(%rbx), %rdx
        mov $OUTSIDE, %eax
        cmp $4, %rcx
        jae at_user
        push %rdx
        popfq
        cmp $1, %cl
        je 5f
        ja 6f
        mov (%rdi), %rax
        int3
5:      mov %rsi, (%rdi)
        int3
6:      jmp *%rdi
at_user:
        pushq $0x23
        pushq $0
        push %rdx
        pushq $0x1b
        shl $4, %rcx
        mov $USER - 64, %edx
        add %rdx, %rcx
        push %rcx
        mov $4, %edx
        iretq

        # Whatever comes of an access ends here, as an exception: vector, error code, RIP and so on are on the stack.
trapped:
        mov current(%rip), %rbx
        mov %rax, 88(%rbx)
        pop %rax
        mov %rax, 64(%rbx)
        pop %rax
        mov %rax, 72(%rbx)
        mov %cr2, %rax
        mov %rax, 80(%rbx)
        pop %rax
        mov %rax, 96(%rbx)
        mov $STACK, %esp
        pushq $2
        popfq
        mov HEADER + 24, %eax
        mov %rax, %cr3
        mov HEADER + 16, %eax
        mov %rax, %cr4
        mov $0x80000033, %eax
        mov %rax, %cr0
        take_words
        mov %rsi, current(%rip)
        mov $HEADER, %eax
        incq 8(%rax)
        jmp next

done:   finish

        .balign 16
vectors:
        .set vector, 0
        .rept 32
        .balign 16
        .if !((0x60227d00 >> vector) & 1)
        pushq $0
        .endif
        pushq $vector
        jmp trapped
        .set vector, vector + 1
        .endr

        # What is written has a page without code, which would be translated again each time.
        .org 0x1000
gdt:    .quad 0
        .quad 0x00af9b000000ffff        # 0x08 code, CPL 0
        .quad 0x00cf93000000ffff        # 0x10 data
        .quad 0x00affb000000ffff        # 0x18 code, CPL 3
        .quad 0x00cff3000000ffff        # 0x20 data, CPL 3
ldt:    .quad 0, 0                      # 0x28 made for each implicit access
        .quad 0x0000890000000067 | (BASE + 0x1200) << 16, 0      # 0x38 the task state
gdt_pointer:
        .word gdt_pointer - gdt - 1
        .quad BASE + 0x1000
idt_pointer:
        .word 32 * 16 - 1
        .quad IDT

        .org 0x1200
        .long 0
        .quad STACK                     # RSP0
        .org 0x1200 + 0x66
        .word 0x68                      # no I/O bitmap
current:
        .quad 0                         # the case

        # What runs at CPL 3, 16 bytes each: read, write, fetch, and a read that the processor does on its own account.
        .org 0x2000
user:   mov (%rdi), %rax
        int3
        .org 0x2010
        mov %rsi, (%rdi)
        int3
        .org 0x2020
        jmp *%rdi
        .org 0x2030
        lar %edx, %eax
        int3
        .org 0x3000
