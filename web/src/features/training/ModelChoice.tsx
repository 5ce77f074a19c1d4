import { shortName } from '@/features/generate/ModelPicker';
import type { DataKind, Model } from '@/types/api';
import { Select, Text } from '@mantine/core';
import { useTranslation } from 'react-i18next';

interface Props {
  models: readonly Model[];
  value: Model | null;
  onChange: (id: string | null) => void;
}

/** What is trained: a base model, or a tuned one that goes on from where it stands. */
export function ModelChoice({ models, value, onChange }: Props) {
  const { t } = useTranslation();
  const items = (tuned: boolean, kind?: DataKind) =>
    models
      .filter((each) => (each.parent !== null) === tuned && (!kind || kindOf(each) === kind))
      .map((each) => ({
        value: each.id,
        label: shortName(each) + (each.available ? '' : ` · ${t('generate.offline')}`),
      }));
  const groups = [
    { group: t('pictured.baseOf', { kind: t('pictured.kind_text') }), items: items(false, 'text') },
    { group: t('pictured.baseOf', { kind: t('pictured.kind_pictures') }), items: items(false, 'pictures') },
    { group: t('generate.tuned'), items: items(true) },
  ];
  return (
    <>
      <Select
        aria-label={t('training.stepModel')}
        value={value?.id ?? null}
        onChange={onChange}
        data={groups.filter(({ items }) => items.length > 0)}
        allowDeselect={false}
      />
      {value?.parent ? (
        <Text size="sm" c="dimmed">
          {t('hyper.continueText')}
        </Text>
      ) : null}
    </>
  );
}

/** What a model learns from. */
export const kindOf = (model: Model): DataKind => (model.family === 'sd' ? 'pictures' : 'text');
