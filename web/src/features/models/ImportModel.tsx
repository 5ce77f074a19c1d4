import { ErrorNote } from '@/components/ErrorNote';
import { modelsQuery } from '@/features/generate/queries';
import { suffixIsGood } from '@/features/training/form';
import { Button, FileInput, Progress, Select, Stack, Text, TextInput } from '@mantine/core';
import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { importModel, type Import } from './queries';

/** An adapter from elsewhere becomes a tuned model like any other. */
export function ImportModel({ onDone }: { onDone: () => void }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const bases = useQuery(modelsQuery).data?.filter((each) => each.parent === null) ?? [];
  const [file, setFile] = useState<File | null>(null);
  const [chosen, setChosen] = useState<string | null>(null);
  const [suffix, setSuffix] = useState('');
  const [share, setShare] = useState(0);
  const base = chosen ?? bases[0]?.id ?? null;
  const importing = useMutation({
    mutationFn: (asked: Import) => importModel(asked, setShare),
    onSuccess: async () => {
      await queryClient.invalidateQueries({ queryKey: modelsQuery.queryKey });
      onDone();
    },
  });
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        setShare(0);
        if (file && base) importing.mutate({ file, base, suffix: suffix.trim() });
      }}
    >
      <Stack>
        <Text size="sm" c="dimmed">
          {t('models.importText')}
        </Text>
        <FileInput
          label={t('models.importFile')}
          placeholder={t('models.importChoose')}
          value={file}
          onChange={setFile}
          accept=".zip,.safetensors,application/zip"
        />
        <Select
          label={t('models.importBase')}
          value={base}
          onChange={setChosen}
          data={bases.map((each) => each.id)}
          allowDeselect={false}
        />
        <TextInput
          label={t('training.suffix')}
          description={t('training.suffixText')}
          value={suffix}
          onChange={(event) => setSuffix(event.currentTarget.value)}
          error={suffixIsGood(suffix) ? null : t('training.suffixBad')}
          maxLength={64}
          spellCheck={false}
          autoComplete="off"
        />
        {importing.isPending ? (
          <div role="status">
            <Text size="sm">
              {share < 1
                ? t('models.importSending', { percent: `${Math.floor(100 * share)}%` })
                : t('models.importChecking')}
            </Text>
            <Progress value={100 * share} animated={share >= 1} aria-label={t('models.import')} mt={6} />
          </div>
        ) : null}
        {importing.error ? <ErrorNote error={importing.error} /> : null}
        <Button type="submit" loading={importing.isPending} disabled={!file || !base || !suffixIsGood(suffix)}>
          {t('models.importYes')}
        </Button>
      </Stack>
    </form>
  );
}
