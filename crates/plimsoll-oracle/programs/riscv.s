# Runs the cases of a batch on a RISC-V hart: batch.rs has the batch's form, riscv.rs what the words of a case mean.
#
# HS mode runs through tables at OWN, which are the identity. What runs in VS and VU mode is the page `guest`, which every tree maps.
        .option arch, rv64imah_zicsr
        .set BASE, 0x80000000
        .set SAVED, BASE + 0x300000
        .set HEADER, BASE + 0x400000
        .set STORED, 0x53544f5245442121
        .set POWER, 0x100000
        .set OWN, BASE + 0x220000

        .globl _start
_start:
        li t0, -1
        csrw pmpaddr0, t0
        csrw medeleg, t0
        csrw mideleg, t0
        li t1, 0x1f                     # all memory, by anyone
        csrw pmpcfg0, t1
        li t0, 3 << 61                  # PBMTE, ADUE
        csrw 0x30a, t0                  # menvcfg
        csrw 0x60a, t0                  # henvcfg
        la t0, lost
        csrw mtvec, t0
        csrw hedeleg, zero
        li t0, 8 << 60 | OWN >> 12
        csrw satp, t0
        sfence.vma
        li t0, 3 << 11 | 1 << 39
        csrc mstatus, t0
        li t0, 1 << 11
        csrs mstatus, t0
        la t0, begin
        csrw mepc, t0
        mret

lost:   # Nothing is to come here.
        li t0, POWER
        li t1, 0x13333
        sw t1, (t0)
        j lost

begin:
        la t0, trapped
        csrw stvec, t0
        li s0, HEADER + 128             # the case
        li s2, STORED
next:
        li t0, HEADER
        ld t1, 0(t0)
        ld t2, 8(t0)
        beq t1, t2, done
        # The case's words into memory, and those there into SAVED.
        ld t0, 120(s0)
        addi t1, s0, 128
        li t2, SAVED
        beqz t0, 2f
1:      ld t3, 0(t1)
        ld t4, 0(t3)
        sd t4, 0(t2)
        ld t4, 8(t1)
        sd t4, 0(t3)
        addi t1, t1, 16
        addi t2, t2, 8
        addi t0, t0, -1
        bnez t0, 1b
2:      fence.i
        ld t0, 16(s0)
        csrw vsatp, t0
        ld t0, 24(s0)
        csrw hgatp, t0
        ld t0, 32(s0)
        csrw vsstatus, t0
        ld t0, 40(s0)
        csrw hstatus, t0
        li t0, 1 << 19 | 1 << 8         # MXR, SPP
        csrc sstatus, t0
        ld t0, 48(s0)
        csrs sstatus, t0
        hfence.gvma
        hfence.vvma
        li a0, 0
        ld a1, 8(s0)
        mv a2, s2
        ld t0, 0(s0)
        li t1, 1
        beq t0, t1, 4f
        bgtu t0, t1, 5f
        ld t0, 56(s0)                   # where the guest begins
        csrw sepc, t0
        sret
4:      hlv.d a0, (a1)
        ebreak
5:      hsv.d a2, (a1)
        ebreak

        # Whatever comes of an access ends here.
        .balign 4
trapped:
        csrr t0, scause
        sd t0, 64(s0)
        csrr t0, stval
        sd t0, 72(s0)
        csrr t0, 0x643                  # htval
        sd t0, 80(s0)
        csrr t0, 0x64a                  # htinst
        sd t0, 88(s0)
        sd a0, 96(s0)
        csrr t0, sepc
        sd t0, 104(s0)
        csrr t0, hstatus
        sd t0, 112(s0)
        # The words as they are now into the record, and those of before into memory.
        ld t0, 120(s0)
        addi t1, s0, 128
        li t2, SAVED
        beqz t0, 2f
1:      ld t3, 0(t1)
        ld t4, 0(t3)
        sd t4, 8(t1)
        ld t4, 0(t2)
        sd t4, 0(t3)
        addi t1, t1, 16
        addi t2, t2, 8
        addi t0, t0, -1
        bnez t0, 1b
2:      mv s0, t1
        li t0, HEADER
        ld t1, 8(t0)
        addi t1, t1, 1
        sd t1, 8(t0)
        j next

done:
        li t0, POWER
        li t1, 0x5555
        sw t1, (t0)
1:      j 1b

        # What runs in VS and VU mode, 16 bytes each: a load, a store.
        .org 0x1000
guest:  ld a0, (a1)
        ebreak
        .org 0x1010
        sd a2, (a1)
        ebreak
        .org 0x2000
