// Runs the cases of a batch on an Arm processor: batch.rs has the batch's form, arm.rs what the words of a case mean.
//
// EL2 runs untranslated and has addresses translated for EL1 and EL0 (AT), so nothing is accessed and no tree has to map this.
        .arch armv8.2-a
        .set SAVED, 0x40300000
        .set HEADER, 0x40400000

        .globl _start
_start:
        adr x0, vectors
        msr vbar_el2, x0
        ldr x20, =HEADER
        ldr x0, [x20, #16]
        msr mair_el1, x0
        add x19, x20, #128              // the case
next:
        ldr x0, [x20]
        ldr x1, [x20, #8]
        cmp x0, x1
        b.eq done
        // The case's words into memory, and those there into SAVED.
        ldr x0, [x19, #120]
        add x1, x19, #128
        ldr x2, =SAVED
        cbz x0, 2f
1:      ldp x3, x4, [x1], #16
        ldr x5, [x3]
        str x5, [x2], #8
        str x4, [x3]
        subs x0, x0, #1
        b.ne 1b
2:      ldp x0, x1, [x19]               // what, address
        ldp x2, x3, [x19, #16]
        msr ttbr0_el1, x2
        msr ttbr1_el1, x2
        msr sctlr_el1, x3
        ldp x2, x3, [x19, #32]
        msr tcr_el1, x2
        msr vttbr_el2, x3
        ldp x2, x3, [x19, #48]
        msr vtcr_el2, x2
        msr hcr_el2, x3
        msr pan, #0
        tbz x0, #8, 3f
        msr pan, #1
3:      dsb sy
        tlbi alle1
        dsb sy
        isb
        and x0, x0, #15
        adr x2, table
        add x2, x2, x0, lsl #3
        br x2
table:  at s1e1r, x1
        b translated
        at s1e1w, x1
        b translated
        at s1e0r, x1
        b translated
        at s1e0w, x1
        b translated
        at s12e1r, x1
        b translated
        at s12e1w, x1
        b translated
        at s12e0r, x1
        b translated
        at s12e0w, x1
        b translated
        at s1e1rp, x1
        b translated
        at s1e1wp, x1
translated:
        isb
        mrs x0, par_el1
        str x0, [x19, #64]
        mov x0, xzr
caught: // The words as they are now into the record, and those of before into memory. x0 is ESR_EL2 of an exception.
        str x0, [x19, #72]
        dsb sy
        ldr x0, [x19, #120]
        add x1, x19, #128
        ldr x2, =SAVED
        cbz x0, 2f
1:      ldr x3, [x1], #8
        ldr x4, [x3]
        str x4, [x1], #8
        ldr x4, [x2], #8
        str x4, [x3]
        subs x0, x0, #1
        b.ne 1b
2:      mov x19, x1
        ldr x0, [x20, #8]
        add x0, x0, #1
        str x0, [x20, #8]
        b next

done:
        ldr x0, =0x84000008             // PSCI's SYSTEM_OFF
        smc #0
1:      wfi
        b 1b
        .ltorg

        .balign 2048
vectors:
        .rept 16
        .balign 128
        mrs x0, esr_el2
        b caught
        .endr
