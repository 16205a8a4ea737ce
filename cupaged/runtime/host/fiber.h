// One CPU context switch: save the registers that a call must preserve, swap stacks, restore. A dozen instructions
// where swapcontext() makes two system calls.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && !defined(_WIN32)

// void switch_stack(void** save, void* restore): store this stack's pointer in *save, continue on `restore`.
extern "C" void cupaged_switch_stack(void** save, void* restore);
asm(R"(
    .text
    .globl cupaged_switch_stack
    .hidden cupaged_switch_stack
    .type cupaged_switch_stack, @function
cupaged_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cupaged_switch_stack, .-cupaged_switch_stack
)");

namespace cupaged {
// Lay out a fresh stack so that the first switch to it enters `entry`, which must never return.
inline void* fresh_stack(void* top, void (*entry)()) {
  auto* slot = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--slot = 0;                                    // where a caller's return address would be: keeps the ABI's alignment
  *--slot = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--slot = 0;        // rbp, rbx, r12 to r15
  return slot;
}
}  // namespace cupaged

#elif defined(__aarch64__)

extern "C" void cupaged_switch_stack(void** save, void* restore) asm("cupaged_switch_stack");
asm(R"(
    .text
    .globl cupaged_switch_stack
    .p2align 2
cupaged_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");

namespace cupaged {
inline void* fresh_stack(void* top, void (*entry)()) {
  auto* slot = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15}) - 20;
  for (int i = 0; i < 20; ++i) slot[i] = 0;
  slot[11] = reinterpret_cast<uint64_t>(entry);   // x30, the link register
  return slot;
}
}  // namespace cupaged

#else
#error "the host build switches stacks on x86-64 (not Windows) and aarch64; add this processor's switch to fiber.h"
#endif
