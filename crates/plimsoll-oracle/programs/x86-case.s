# What the programs for x86-64 do with a case whose record is at %rbx: batch.rs has its form. Their texts begin with this one.

        .set SAVED, 0x300000
        .set HEADER, 0x400000

        # The case's words into memory, and those there into SAVED.
        .macro put_words
        mov 120(%rbx), %rcx
        lea 128(%rbx), %rsi
        mov $SAVED, %edx
        jrcxz 2f
1:      mov (%rsi), %rdi
        mov (%rdi), %rax
        mov %rax, (%rdx)
        mov 8(%rsi), %rax
        mov %rax, (%rdi)
        add $16, %rsi
        add $8, %rdx
        dec %rcx
        jnz 1b
2:
        .endm

        # The words as they are now into the record, and those of before into memory. Leaves the next record's address in %rsi.
        .macro take_words
        mov 120(%rbx), %rcx
        lea 128(%rbx), %rsi
        mov $SAVED, %edx
        jrcxz 2f
1:      mov (%rsi), %rdi
        mov (%rdi), %rax
        mov %rax, 8(%rsi)
        mov (%rdx), %rax
        mov %rax, (%rdi)
        add $16, %rsi
        add $8, %rdx
        dec %rcx
        jnz 1b
2:
        .endm

        # QEMU ends.
        .macro finish
        mov $0x10, %eax
        out %al, $0xf4
1:      hlt
        jmp 1b
        .endm

