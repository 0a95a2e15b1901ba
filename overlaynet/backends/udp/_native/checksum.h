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

/* Add `size` bytes to a sum. Of several pieces, all but the last must be of even size. */
static inline uint64_t checksum_add(uint64_t sum, const uint8_t *data, size_t size)
{
    /* The halves of each word are summed apart, without carries, so that compilers can vectorise the loop. They can not
     * overflow: no packet has 2^32 words. */
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
    /* Each below 2^46 for any packet: the caller's sum, folded or not, has room for thousands of them. */
    return sum + low + high;
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
