# Runs the cases of a batch in a guest of an x86-64 processor, over nested tables: batch.rs has the batch's form, npt.rs what the words of
# a case mean.
#
# The host's linear addresses are physical below 2 GiB, by tables that no case touches. Every exception of the guest's is an exit, so that
# it has neither descriptor tables nor a stack.
        .set BASE, 0x100000
        .set VMCB, 0x130000
        .set HOST_SAVE, 0x131000
        .set STORED, 0x53544f5245442121
        .set OUTSIDE, 0x80000000

        .set EXCEPTIONS, VMCB + 0x08
        .set INTERCEPTS, VMCB + 0x10
        .set ASID, VMCB + 0x58
        .set TLB_CONTROL, VMCB + 0x5c
        .set EXIT_CODE, VMCB + 0x70
        .set EXIT_INFO_1, VMCB + 0x78
        .set EXIT_INFO_2, VMCB + 0x80
        .set NESTED, VMCB + 0x90
        .set NESTED_CR3, VMCB + 0xb0
        .set CS, VMCB + 0x410
        .set SS, VMCB + 0x420
        .set CPL, VMCB + 0x4cb
        .set EFER, VMCB + 0x4d0
        .set CR4, VMCB + 0x548
        .set CR3, VMCB + 0x550
        .set CR0, VMCB + 0x558
        .set DR7, VMCB + 0x560
        .set DR6, VMCB + 0x568
        .set RFLAGS, VMCB + 0x570
        .set RIP, VMCB + 0x578
        .set RAX, VMCB + 0x5f8
        .set PAT, VMCB + 0x668

        .code32
        .globl _start
_start:
        lgdt BASE + (gdt_pointer - _start)
        mov $1 << 22 | 1 << 5, %eax     # PKE, so that PKRU can be written; PAE
        mov %eax, %cr4
        mov HEADER + 16, %eax
        mov %eax, %cr3
        mov $0xc0000080, %ecx
        mov $0x1100, %eax               # SVME, LME
        xor %edx, %edx
        wrmsr
        mov $0x80000033, %eax
        mov %eax, %cr0
        ljmp $0x08, $BASE + (long - _start)

        .code64
long:
        mov $0xc0010117, %ecx           # VM_HSAVE_PA
        mov $HOST_SAVE, %eax
        xor %edx, %edx
        wrmsr
        movl $0xffffffff, EXCEPTIONS
        movl $1, INTERCEPTS             # VMRUN, which has to be
        movl $1, ASID
        movl $1, TLB_CONTROL            # all is forgotten at each entry
        movq $1, NESTED
        movl $0xffff0ff0, DR6
        movl $0x400, DR7
        movl $0x00070406, PAT
        movl $0x00070406, PAT + 4
        mov $HEADER + 128, %ebx         # the case

next:
        mov $HEADER, %eax
        mov (%rax), %rcx
        cmp 8(%rax), %rcx
        je done
        put_words
        mov (%rbx), %rax
        mov %rax, RIP
        mov 16(%rbx), %rax
        mov %rax, CR3
        mov 24(%rbx), %rax
        mov %rax, NESTED_CR3
        mov 32(%rbx), %eax
        mov %rax, CR0
        mov 36(%rbx), %eax
        mov %al, CPL
        shl $5, %eax                    # DPL
        mov %eax, %ecx
        or $0xa9b, %ecx
        mov %cx, CS + 2
        movl $0xffffffff, CS + 4
        or $0xc93, %eax
        mov %ax, SS + 2
        movl $0xffffffff, SS + 4
        mov 40(%rbx), %rax
        mov %rax, CR4
        mov 48(%rbx), %eax
        mov %rax, EFER
        mov 56(%rbx), %eax
        mov %rax, RFLAGS
        mov $OUTSIDE, %eax
        mov %rax, RAX
        # The host's own EFER, and PKRU, which both have.
        mov $0xc0000080, %ecx
        mov 52(%rbx), %eax
        xor %edx, %edx
        wrmsr
        xor %ecx, %ecx
        mov 60(%rbx), %eax
        wrpkru
        mov 8(%rbx), %rdi
        mov $STORED, %rsi
        mov $VMCB, %eax
        vmrun
        mov EXIT_CODE, %rax
        mov %rax, 64(%rbx)
        mov EXIT_INFO_1, %rax
        mov %rax, 72(%rbx)
        mov EXIT_INFO_2, %rax
        mov %rax, 80(%rbx)
        mov RAX, %rax
        mov %rax, 88(%rbx)
        mov RIP, %rax
        mov %rax, 96(%rbx)
        take_words
        mov %rsi, %rbx
        mov $HEADER, %eax
        incq 8(%rax)
        jmp next

done:   finish

        .org 0x1000
gdt:    .quad 0
        .quad 0x00af9b000000ffff        # 0x08 code
gdt_pointer:
        .word gdt_pointer - gdt - 1
        .quad BASE + 0x1000

        # What runs in the guest, 16 bytes each: a read, a write.
        .org 0x2000
        mov (%rdi), %rax
        ud2
        .org 0x2010
        mov %rsi, (%rdi)
        ud2
        .org 0x3000
