/* A float32 as three bfloat16s whose sum it is, exactly: 24 bits of mantissa are three times eight. Six of the nine
 * products of two such sums, all but those below 2^-24 of the whole, make up a float32 product on matrix tiles, which
 * multiply bfloat16 sixteen times as fast as vector units multiply float32. Each of the six is exact; what rounds is the
 * sum, as it does in any float32 product. Method: Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial
 * Intelligence Datatype For Higher-Precision Computations" (arXiv:1904.06376). */

#ifndef LORA_PIECES_H
#define LORA_PIECES_H

#include "vectors.h"

#define PIECES 3

/* From the largest to the smallest, each in the upper half of its words. The first is rounded, so that what is left has
 * either sign; the others are cut off. What isn't finite ends as no number, in one of the pieces. */
INLINE void pieces_of(vec value, uvec pieces[PIECES]) {
    const uint32_t upper = 0xffff0000u;
    pieces[0] = ((uvec)value + 0x8000u) & upper;
    vec rest = value - (vec)pieces[0];
    pieces[1] = (uvec)rest & upper;
    pieces[2] = (uvec)(rest - (vec)pieces[1]);
}

#endif
