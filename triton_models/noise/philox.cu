// The noise of a batch of tiles in one launch, bit for bit that of philox.py.
//
// A work item is one Philox block: one pixel of one tile at one pair of steps. Of its eight values at most seven are
// used: channels 0 to 2 of both steps for the images, and channel 3 of step 0 for the cell map. Consecutive items are
// consecutive pixels of a row, so that writes coalesce. Half-precision values are copied as 16-bit words.
//
// CuPy compiles this file with NVRTC, so it includes nothing. The tests compile it as C and define the CUDA keywords
// away.

typedef unsigned int u32;
typedef unsigned long long u64;

// Ten rounds of Philox 4x32 (Salmon et al. 2011), in place.
__device__ __forceinline__ void philox4x32(u32 c[4], u32 k0, u32 k1) {
    for (int round = 0; round < 10; ++round) {
        u64 p0 = (u64)c[0] * 0xD2511F53u;
        u64 p1 = (u64)c[2] * 0xCD9E8D57u;
        u32 high0 = (u32)(p0 >> 32) ^ c[3] ^ k1;
        u32 high1 = (u32)(p1 >> 32) ^ c[1] ^ k0;
        c[0] = high1;
        c[1] = (u32)p1;
        c[2] = high0;
        c[3] = (u32)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// seeds [B], origins [B][2] (x, y), table [65536]; image [B][steps][3][height][width], cells [B][height][width] or null.
__device__ __forceinline__ void noise_item(long long item, const long long *seeds, const long long *origins,
                                           const unsigned short *table, unsigned short *image, unsigned short *cells,
                                           int steps, int height, int width) {
    long long plane = (long long)height * width;
    int pairs = (steps + 1) / 2;
    long long pixel = item % plane;
    int pair = (int)(item / plane % pairs);
    long long tile = item / plane / pairs;
    u32 x = (u32)(pixel % width), y = (u32)(pixel / width);
    u64 seed = (u64)seeds[tile];
    u32 c[4];
    // Addition modulo 2^32 is what negative origins need.
    c[0] = (u32)(u64)origins[2 * tile] + x;
    c[1] = (u32)(u64)origins[2 * tile + 1] + y;
    c[2] = (u32)pair;
    c[3] = 0;
    philox4x32(c, (u32)seed, (u32)(seed >> 32));
    for (int value = 0; value < 8; ++value) {
        int step = 2 * pair + value / 4, channel = value % 4;
        unsigned short drawn = table[(c[value / 2] >> (16 * (value % 2))) & 0xFFFFu];
        if (channel < 3) {
            if (step < steps) image[((tile * steps + step) * 3 + channel) * plane + pixel] = drawn;
        } else if (step == 0 && cells) {
            cells[tile * plane + pixel] = drawn;
        }
    }
}

#ifdef __cplusplus
extern "C"
#endif
__global__ void tile_noise(const long long *seeds, const long long *origins, const unsigned short *table,
                           unsigned short *image, unsigned short *cells, long long items, int steps, int height,
                           int width) {
    long long stride = (long long)gridDim.x * blockDim.x;
    for (long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x; item < items; item += stride)
        noise_item(item, seeds, origins, table, image, cells, steps, height, width);
}
