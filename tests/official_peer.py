"""A small official checkpoint's model, for tests of what reads one."""

from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation, ResNetConfig


def tiny_maskformer() -> MaskFormerForInstanceSegmentation:
    """transformers' MaskFormer of three labels with random weights."""
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    decoder = DetrConfig(d_model=32, decoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=2, num_queries=5)
    config = MaskFormerConfig(
        backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=3
    )
    return MaskFormerForInstanceSegmentation(config)
