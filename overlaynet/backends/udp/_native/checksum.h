/* The Internet checksum (RFC 1071).
 *
 * Sums are kept in the byte order of memory, which the one's complement sum allows (RFC 1071 section 2 (B)): a folded
 * sum can be compared with, and copied into, a packet's field as it is.
 */
#ifndef OVERLAYNET_CHECKSUM_H
#define OVERLAYNET_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* The loop of checksum_add, to be compiled for more than one kind of processor. The halves of each word are summed apart,
 * without carries, so that compilers can vectorise it. They can not overflow: no packet has 2^32 words. */
static inline __attribute__((always_inline)) uint64_t checksum_words(const uint8_t *data, size_t size)
{
    uint64_t low = 0, high = 0;
    while (size >= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        low += word & 0xFFFFFFFFu;
        high += word >> 32;
        data += 8;
        size -= 8;
    }
    if (size > 0) {
        uint64_t word = 0;
        memcpy(&word, data, size);
        low += word & 0xFFFFFFFFu;
        high += word >> 32;
    }
    return low + high;
}

#ifdef __x86_64__
/* The wheel is for all processors of its architecture; those that have wider registers sum almost twice as fast. */
__attribute__((target("avx2"))) static uint64_t checksum_words_avx2(const uint8_t *data, size_t size)
{
    return checksum_words(data, size);
}
#endif

/* Add `size` bytes to a sum. Of several pieces, all but the last must be of even size. */
static inline uint64_t checksum_add(uint64_t sum, const uint8_t *data, size_t size)
{
    /* What is added is below 2^46 for any packet: the caller's sum, folded or not, has room for thousands of them. */
#ifdef __x86_64__
    if (size >= 128 && __builtin_cpu_supports("avx2"))
        return sum + checksum_words_avx2(data, size);
#endif
    return sum + checksum_words(data, size);
}

/* A sum as 16 bits. */
static inline uint16_t checksum_fold(uint64_t sum)
{
    sum = (sum & 0xFFFFFFFFu) + (sum >> 32);
    sum = (sum & 0xFFFFFFFFu) + (sum >> 32);
    sum = (sum & 0xFFFFu) + (sum >> 16);
    sum = (sum & 0xFFFFu) + (sum >> 16);
    return (uint16_t)((sum & 0xFFFFu) + (sum >> 16));
}

/* The checksum over `size` bytes, ready to be stored; zero over data that carries a right one. */
static inline uint16_t checksum(const uint8_t *data, size_t size)
{
    return (uint16_t)~checksum_fold(checksum_add(0, data, size));
}

#endif
